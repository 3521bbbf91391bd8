"""
Damaged and hostile adapters, configs and images: named cases, and 1,000 mutated files, each of which ends in a clear
error or a correct load.

A clear error is one of `CLEAR_ERRORS` with a sentence. A correct load gives the tensors that the bytes of the file
say, as a reader of a few lines finds them, and those that were saved where the file has its SHA-256. The mutated files
are read in a process of its own, so that a crash of the interpreter, a hang or a huge allocation is noticed.
"""

import json
import math
import multiprocessing
import pickle
import random
import resource
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import DEHVF_SIZES, IMAGE_SIZE, save_tiny_bases, tiny_processor
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from dehvf import DehvfConfig, DehvfForConditionalGeneration, adapters


CLEAR_ERRORS = (ValueError, OSError)
WHOLE_LOAD = 25  # one of so many configs and adapters goes through all of `from_pretrained`, the rest through parts
SECONDS = 30  # for a case of milliseconds, on a busy machine
MEMORY = 2 * 2**30  # beyond what is there before the first case; an image that Pillow accepts may take 700 MB


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with `vision`, `text`, and `adapter` as `save_pretrained` wrote it."""
    folder = tmp_path_factory.mktemp("saved")
    vision, text = save_tiny_bases(folder)
    torch.manual_seed(0)
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(vision, text, **DEHVF_SIZES)
    for parameter in model.adapter_state_dict().values():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def broken(saved, tmp_path):
    """A copy of the adapter to break. Its base models are not copied."""
    return Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))


def load(folder):
    return AutoModel.from_pretrained(folder, trust_remote_code=True)


# --- named cases: adapters ---


class Intruder:
    """Leaves a file behind when a pickle that contains it is loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_no_pickle_is_loaded(saved, broken):
    mark = broken.parent / "was here"
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (broken / name).write_bytes(pickle.dumps(Intruder(mark)))
    pickle.loads((broken / "optimizer.pt").read_bytes())
    assert mark.exists(), "these pickles would not be noticed"
    mark.unlink()
    model = load(broken)
    assert AutoProcessor.from_pretrained(broken, trust_remote_code=True) and not mark.exists()
    model.save_pretrained(broken.parent / "merged", merge_base=True)
    base = broken.parent / "merged" / "text_model"
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Intruder(mark)))
    for folder, message in ((broken, "has no model.safetensors, so there is no adapter"), (base, "model.safetensors")):
        (folder / "model.safetensors").unlink()
        with pytest.raises(OSError, match=message):
            load(folder.parent if folder is base else folder)
    assert not mark.exists()


def flip(data: bytes, place: int, bit: int = 2) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


@pytest.mark.parametrize("kind", ["adapter", "visual memory"])
def test_a_damaged_file_is_named_with_what_to_do(saved, broken, kind):
    model, file = load(saved / "adapter"), broken / "model.safetensors"
    if kind == "visual memory":
        file = broken / "memory.safetensors"
        model.save_visual_memory(model.get_image_features(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)), file)
    data, read = file.read_bytes(), model.load_visual_memory if kind == "visual memory" else lambda _: load(broken)
    for damaged, message in (
        (data[:-100], f"{file} is damaged and cannot be read: .*Copy or download it again"),
        (flip(data, -100), f"{file} is damaged: its tensors differ from those that were saved. Copy"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(OSError, match=message):
            read(file)


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.full((20, 32), float("nan")), "`model.memory_slots.key` in .* infinite or NaN"),
        (torch.full((20, 32), -float("inf")), "infinite or NaN"),
        (torch.zeros(20, 32, dtype=torch.int32), "has the dtype torch.int32. Save it as one of .*torch.float32"),
        (torch.zeros(20, 32, dtype=torch.float64), "has the dtype torch.float64"),
        (torch.zeros(20, 32).to(torch.float8_e4m3fn), "has the dtype torch.float8_e4m3fn"),
    ],
    ids=["nan", "infinite", "int32", "float64", "float8"],
)
def test_tensors_that_are_no_weights_are_refused(broken, value, message):
    tensors = load_file(broken / "model.safetensors")
    save_file({**tensors, "model.memory_slots.key": value}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(broken)


def test_a_visual_memory_that_does_not_fit_is_refused(saved, tmp_path):
    model, file = load(saved / "adapter"), tmp_path / "memory.safetensors"
    memory = model.get_image_features(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)).pooler_output
    model.save_visual_memory(memory, file)
    loaded, encoder = model.load_visual_memory(file), load_file(file)["vision_encoder"].clone()
    metadata = split_file(file.read_bytes())[0]["__metadata__"]
    with open(file, "r+b") as opened:  # in place, as rsync and some file systems do
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(loaded, memory), "it does not follow its file"
    del metadata["sha256"]
    for name, value, message in (
        ("visual_memory", torch.full((1, 2), float("nan")), "infinite or NaN"),
        ("visual_memory", torch.zeros(1, 2), r"`visual_memory` has the shape \(1, 2\)"),
        ("other", torch.zeros(1, 2), "it has no tensor of that name"),
    ):
        save_file({name: value, "vision_encoder": encoder}, file, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            model.load_visual_memory(file)


# --- named cases: configs ---


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_memory_slots": 10**12}, r"wrong shape: model.memory_slots.key is \(20, 32\), .* \(1000000000000, 32\)"),
        ({"num_memory_slots": 10**30}, "No adapter can be built from the config"),
        ({"num_memory_slots": "many"}, "num_memory_slots"),
        ({"image_size": 19}, "`image_size` is 19, but must be a positive multiple of .* 4. The nearest is 20"),
        ({"image_size": -8}, "`image_size` is -8, .* The nearest is 4"),
        ({"image_size": 64}, "`num_memory_slots=20` is less than the 256 patches .* or lower `image_size`"),
        ({"num_memory_slots": -20}, "`num_memory_slots=-20` is less than the 16 patches"),
        ({"fuser_hidden_size": -4}, "`fuser_hidden_size` is -4, but must be at least 1"),
        ({"fuser_num_heads": 0}, "`fuser_num_heads` is 0, but must be at least 1"),
        ({"initializer_range": -0.02}, "`initializer_range` is -0.02, but must be at least 0"),
        (
            {"vision_config": {"model_type": "clip_vision_model", "patch_size": 0}},
            "`patch_size=0`, but a whole",
        ),
        ({"fuser_num_layers": 10**9}, "`fuser_num_layers` is 1000000000, but must be at most 1000"),
        ({"text_config": {"model_type": "llama", "num_hidden_layers": 10**9}}, "must be at most 1000"),
        ({"text_config": 5}, "text_config"),
        ({"memory_scale": float("nan")}, "`memory_scale` is nan, but must be a finite number"),
        ({"model_type": "llama"}, "has `model_type='llama'`, but"),
        ({"model_type": None}, "has `model_type=None`"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_an_invalid_config_is_refused(broken, change, message):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load(broken)


def test_a_config_that_is_no_json_object_is_refused_and_unknown_keys_are_kept(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"from_the_future": 7}))
    assert load(broken).config.from_the_future == 7
    for name in ("generation_config.json", "config.json"):
        for text in ("", "{", "[1]", "5", "[" * 100_000, "\ufeff{}")[: 2 if name != "config.json" else None]:
            (broken / name).write_text(text)
            with pytest.raises(CLEAR_ERRORS, match="onfig"):
                DehvfForConditionalGeneration.from_pretrained(broken)


# --- mutated files ---


def mutate_bytes(data: bytes, generator: random.Random) -> bytes:
    """A few flipped bits; a part cut off, cut out, overwritten or inserted."""
    place, length = generator.randrange(len(data)), generator.choice([1, 4, 64, len(data) // 3])
    kind = generator.choice(["flip", "flip", "flip", "cut off", "cut out", "overwrite", "insert"])
    if kind == "flip":
        for _ in range(generator.choice([1, 1, 1, 8])):
            data = flip(data, generator.randrange(len(data)), generator.randrange(8))
        return data
    if kind == "cut off":
        return data[: generator.choice([0, 1, 7, 8, 9, place])]
    noise = b"" if kind == "cut out" else generator.randbytes(length)
    return data[:place] + noise + data[place + (0 if kind == "insert" else length) :]


# A safetensors file is 8 bytes with the length of a JSON header, the header, the data


def split_file(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_file(header: dict, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HUGE = [2**31, 2**40, 2**62, 2**63, 2**64 - 1, 10**30]
DTYPES = ["F64", "F16", "BF16", "I32", "U32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "f32", "F99", "", 1]
METADATA = [{}, None, "no", {"sha256": "0" * 64}, {"sha256": 5}, {"format": "tf"}, {"sha256": "", "format": "pt"}]


def mutate_adapter(data: bytes, generator: random.Random) -> bytes:
    header, tensors = split_file(data)
    first, second = generator.sample([name for name in header if name != "__metadata__"], 2)
    entry, huge, choose = header[first], generator.choice(HUGE), generator.choice
    kind = choose(["bytes", "bytes", "data", "length", "offsets", "shape", "dtype", "names", "swap", "metadata"])
    if kind == "bytes":
        return mutate_bytes(data, generator)
    if kind == "length":
        return join_file(header, tensors, choose([0, 1, 7, len(data), huge % 2**64]))
    if kind == "data":  # a legitimate file with other numbers in it, infinite ones among them
        place, value = 4 * generator.randrange(len(tensors) // 4), choose([math.nan, math.inf, -math.inf, 0.5, 1e-45])
        tensors = tensors[:place] + struct.pack("<f", value) + tensors[place + 4 :]
    elif kind == "offsets":
        start, end = entry["data_offsets"]
        places = [[end, start], [start, huge], [huge, huge], [start, end + 4], [start + 4, end + 4], [-4, end]]
        places += [[start], [start, start], header[second]["data_offsets"], "no", None, [float(start), float(end)]]
        entry["data_offsets"] = choose(places)
    elif kind == "shape":
        shape, size = entry["shape"], math.prod(entry["shape"])
        entry["shape"] = choose([shape[::-1], [size], [*shape, 1], [huge, huge], [0], [], [-1], "no", None, [1.5]])
    elif kind == "dtype":
        entry["dtype"] = choose(DTYPES)
    elif kind == "names":
        new = choose([first.upper(), "", "__metadata__", "x" * 10_000, "../../etc/passwd", "\0", second])
        header[new] = header.pop(first)
    elif kind == "swap":
        header[first], header[second] = header[second], header[first]
    else:
        header["__metadata__"] = choose(METADATA)
    return join_file(header, tensors)


def tensors_in(data: bytes) -> dict[str, torch.Tensor]:
    """What the bytes of a valid file say, without safetensors."""
    header, buffer = split_file(data)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]]
        numbers = np.frombuffer(buffer[slice(*entry["data_offsets"])], kind)
        if entry["dtype"] == "BF16":
            numbers = (numbers.astype("<u4") << 16).view("<f4")
        tensors[name] = torch.from_numpy(numbers.astype("<f4")).reshape(entry["shape"])
    return tensors


def expected_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return DehvfForConditionalGeneration._empty_adapter(DehvfConfig.from_pretrained(folder), folder).state_dict()


class Adapters:
    """Every second file has no SHA-256, as another program would write it."""

    number = 500

    def __init__(self, folder: Path):
        self.folder = folder / "adapter"
        self.file = self.folder / "model.safetensors"
        # Copies, since what is read is mapped to the file
        self.saved = {name: tensor.clone() for name, tensor in load_file(self.file).items()}
        save_file(self.saved, folder / "plain.safetensors", metadata={"format": "pt"})
        self.originals = self.file.read_bytes(), (folder / "plain.safetensors").read_bytes()
        self.metadata = split_file(self.originals[0])[0]["__metadata__"]
        self.expected = expected_tensors(self.folder)

    def load(self, index: int, generator: random.Random) -> str:
        data = mutate_adapter(self.originals[index % 2], generator)
        self.file.write_bytes(data)
        if index % WHOLE_LOAD:
            loaded = adapters.load_adapter_tensors(self.folder, {})
            adapters.check_adapter_tensors(loaded, self.expected, self.folder)
        else:
            loaded = load(self.folder).adapter_state_dict()
        written = tensors_in(data)
        assert loaded.keys() == self.saved.keys() == written.keys()
        for name, tensor in loaded.items():
            assert torch.equal(tensor.float(), written[name]) and tensor.isfinite().all(), name
        if split_file(data)[0].get("__metadata__") == self.metadata:
            assert all(torch.equal(tensor, self.saved[name]) for name, tensor in loaded.items())
        return "loaded"


VALUES = [None, True, False, 0, -1, 1, 3, 2**31, 10**12, 10**30, -(10**30), 0.5, -0.5, 1e308, "", "no", "5", "../x"]
VALUES += [[], {}, math.nan, math.inf, [1, 2], {"model_type": "llama"}, {"model_type": "no"}, "\0", "x" * 100_000]
NEW_KEYS = ["unknown", "dtype", "quantization_config", "auto_map", "architectures"]


def mutate_config(data: bytes, generator: random.Random) -> bytes:
    if generator.random() < 0.25:
        return mutate_bytes(data, generator)
    if generator.random() < 0.05:
        return generator.choice([b"[" * 100_000, *(json.dumps(value).encode() for value in VALUES)])
    config = json.loads(data)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        part = config.get(generator.choice(["vision_config", "text_config", None, None]))
        part = part if isinstance(part, dict) else config
        name, value = generator.choice(list(part)), json.loads(json.dumps(generator.choice(VALUES)))
        kind = generator.choice(["value", "value", "value", "scale", "delete", "rename", "add", "copy"])
        if kind == "scale" and isinstance(part[name], int | float):
            part[name] *= generator.choice([-1, 2, 1000, 10**9, 0.1, 1.0])
        elif kind == "delete":
            del part[name]
        elif kind == "rename":
            part[generator.choice([name.upper(), "", "self", "__class__", "to_dict"])] = part.pop(name)
        elif kind == "copy":
            part[name] = part[generator.choice(list(part))]
        else:
            part[generator.choice(NEW_KEYS) if kind == "add" else name] = value
    return json.dumps(config).encode()


class Configs:
    number = 200

    def __init__(self, folder: Path):
        self.folder = folder / "adapter"
        self.file = self.folder / "config.json"
        self.original = self.file.read_bytes()
        self.saved = load_file(self.folder / "model.safetensors")

    def load(self, index: int, generator: random.Random) -> str:
        self.file.write_bytes(mutate_config(self.original, generator))
        if index % WHOLE_LOAD:
            adapters.check_adapter_tensors(self.saved, expected_tensors(self.folder), self.folder)
            return "fits"
        loaded = DehvfForConditionalGeneration.from_pretrained(self.folder).adapter_state_dict()
        assert loaded.keys() == self.saved.keys()
        assert all(torch.equal(tensor, self.saved[name]) for name, tensor in loaded.items())
        return "loaded"


class Images:
    """Of each kind that is met in data sets."""

    number = 300

    def __init__(self, folder: Path):
        self.file = folder / "image"
        self.processor = tiny_processor()
        warnings.simplefilter("ignore")  # Pillow warns of damage that it can read past
        shades = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
        image, grey = Image.fromarray(shades), Image.fromarray(shades[..., 0].astype(np.uint16) * 257)
        turned = Image.Exif()
        turned[0x112] = 6
        images = [(image, kind, {}) for kind in ("PNG", "WEBP", "BMP", "PPM", "TGA")]
        images += [(one, "PNG", {}) for one in (image.quantize(16), image.convert("RGBA"), grey)]
        images += [(image, "JPEG", {"exif": turned}), (image.convert("CMYK"), "JPEG", {})]
        images += [(image, "GIF", {"save_all": True, "append_images": [image.rotate(90)]})]
        images += [(image, "TIFF", {"compression": "tiff_lzw"})]
        self.originals = []
        for image, kind, options in images:
            image.save(self.file, kind, **options)
            self.process()
            self.originals.append(self.file.read_bytes())

    def process(self):
        pixels = self.processor(images=str(self.file), text="a", return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE) and pixels.isfinite().all()

    def load(self, index: int, generator: random.Random) -> str:
        self.file.write_bytes(mutate_bytes(self.originals[index % len(self.originals)], generator))
        self.process()
        return "loaded"


def read_all(kind: type, folder: Path, connection):
    """Sends the outcome of each case: `loaded`, `fits`, `error` or, where it is not clear, the error itself."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    reader = kind(folder)
    in_use = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    for index in range(kind.number):
        try:
            outcome = reader.load(index, random.Random(f"{kind.__name__} {index}"))
        except CLEAR_ERRORS as error:
            outcome = "error" if len(str(error).split()) > 4 else f"no sentence: {error!r}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        connection.send(outcome)


def outcomes_of(kind: type, folder: Path) -> list[str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny"])
    ours, theirs = context.Pipe()
    process = context.Process(target=read_all, args=(kind, folder, theirs), daemon=True)
    process.start()
    theirs.close()
    outcomes = []
    try:
        for index in range(kind.number):
            # The first one waits for the imports too
            if not ours.poll(SECONDS if index else 10 * SECONDS):
                raise AssertionError(f"{kind.__name__} {index} takes longer than {SECONDS} s")
            outcomes.append(ours.recv())
    except EOFError:
        process.join()
        raise AssertionError(f"{kind.__name__} {index} ended the process: exit code {process.exitcode}") from None
    finally:
        process.kill()
    return outcomes


@pytest.mark.parametrize("kind", [Adapters, Configs, Images])
def test_damaged_files_end_in_a_clear_error_or_a_correct_load(saved, tmp_path, kind):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    outcomes = outcomes_of(kind, tmp_path)
    unclear = {index: text for index, text in enumerate(outcomes) if text not in ("error", "loaded", "fits")}
    assert not unclear, f"{len(unclear)} of {len(outcomes)}: {unclear}"
    assert len(outcomes) == kind.number
    counts = {text: outcomes.count(text) for text in set(outcomes)}
    # Neither all refused nor all taken, or the mutations say nothing
    assert 0.1 < counts["error"] / kind.number < 0.97, counts
