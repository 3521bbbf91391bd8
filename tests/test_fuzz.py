"""
Damaged and hostile adapters, configs and images: named cases, and 1,200 mutated files, each of which ends in a clear
error or a correct load.

A clear error is one of `CLEAR_ERRORS` with a sentence. A correct load gives the tensors that the file's own bytes say,
as a reader of a few lines finds them; where the file carries its SHA-256, those that were saved. The mutated files are
read in a process of their own, so that a crash of the interpreter, a hang or an absurd allocation is seen, and told by
the number of its case.
"""

import copy
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import (
    DEHVF_SIZES,
    IMAGE_SIZE,
    DehvfConfig,
    DehvfForConditionalGeneration,
    save_tiny_bases,
    tiny_processor,
)
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging


CLEAR_ERRORS = (ValueError, OSError)
NUM_ADAPTERS, NUM_CONFIGS, NUM_IMAGES = 500, 400, 300
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
    """A copy of the adapters to break. Their bases are not copied."""
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder, **kwargs):
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs)


# --- named cases: adapters ---


class Intruder:
    """Leaves a file behind when a pickle with it in is loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def plant_pickles(folder: Path) -> Path:
    """Under all names that `transformers`, its Trainer and peft give to pickles. Returns the file that they leave."""
    mark = folder.parent / "was here"
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Intruder(mark)))
    pickle.loads((folder / "optimizer.pt").read_bytes())
    assert mark.exists(), "these pickles would not tell"
    mark.unlink()
    return mark


def test_no_pickle_beside_adapters_is_loaded(broken):
    mark = plant_pickles(broken)
    assert load(broken) and AutoProcessor.from_pretrained(broken, trust_remote_code=True)
    assert not mark.exists()


def test_adapters_in_a_pickle_are_refused(broken):
    mark = plant_pickles(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(OSError, match="has no model.safetensors, so there are no adapters to load"):
        load(broken)
    assert not mark.exists()


def test_a_pickle_in_place_of_a_merged_base_is_refused(saved, tmp_path):
    load(saved / "adapter").save_pretrained(tmp_path / "merged", merge_base=True)
    base = tmp_path / "merged" / "text_model"
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        load(tmp_path / "merged")


def test_a_flipped_bit_in_the_adapters_is_noticed(broken):
    file = broken / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(OSError, match="model.safetensors is damaged: its tensors are not those that were saved"):
        load(broken)


def test_a_file_that_was_cut_short_is_named_with_what_to_do(broken):
    file = broken / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(OSError, match="adapter/model.safetensors is damaged and cannot be .*download it"):
        load(broken)


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.full((20, 32), float("nan")), "`model.memory_slots.key` in .* infinite or not a number"),
        (torch.full((20, 32), -float("inf")), "infinite or not a number"),
        (torch.zeros(20, 32, dtype=torch.int32), "is of type I32, but must be one of F32, BF16, F16"),
        (torch.zeros(20, 32, dtype=torch.float64), "is of type F64"),
        (torch.zeros(20, 32).to(torch.float8_e4m3fn), "is of type F8_E4M3"),
    ],
    ids=["nan", "infinite", "int32", "float64", "float8"],
)
def test_numbers_that_are_no_weights_are_refused(broken, value, message):
    tensors = load_file(broken / "model.safetensors")
    save_file({**tensors, "model.memory_slots.key": value}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(broken)


def test_a_file_without_sha_256_is_read_as_it_is(broken):
    tensors = load_file(broken / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, broken / "model.safetensors")
    for name, tensor in load(broken).adapter_state_dict().items():
        assert torch.equal(tensor, 2 * tensors[name]), name


def test_a_damaged_visual_memory_is_refused(saved, tmp_path):
    model, file = load(saved / "adapter"), tmp_path / "memory.safetensors"
    model.save_visual_memory(model.get_image_features(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)).pooler_output, file)
    data = file.read_bytes()
    file.write_bytes(data[:-4])
    with pytest.raises(OSError, match="memory.safetensors is damaged and cannot be read"):
        model.load_visual_memory(file)
    file.write_bytes(data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])
    with pytest.raises(OSError, match="its tensors are not those that were saved"):
        model.load_visual_memory(file)
    metadata = split_file(data)[0]["__metadata__"]
    del metadata["sha256"]
    encoder = {"vision_encoder": model._sample_encoder()}
    save_file({"visual_memory": torch.full((1, 2), float("nan")), **encoder}, file, metadata=metadata)
    with pytest.raises(ValueError, match="infinite or not a number"):
        model.load_visual_memory(file)
    save_file({"visual_memory": torch.zeros(1, 2), **encoder}, file, metadata=metadata)
    with pytest.raises(ValueError, match=r"`visual_memory` has the shape \(1, 2\)"):
        model.load_visual_memory(file)
    save_file({"other": torch.zeros(1, 2)}, file, metadata=metadata)
    with pytest.raises(ValueError, match="it holds no tensor of that name"):
        model.load_visual_memory(file)


def test_a_visual_memory_stays_when_its_file_is_overwritten(saved, tmp_path):
    model, file = load(saved / "adapter"), tmp_path / "memory.safetensors"
    memory = model.get_image_features(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)).pooler_output
    model.save_visual_memory(memory, file)
    loaded = model.load_visual_memory(file)
    with open(file, "r+b") as opened:  # in place, as rsync and some file systems do
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(loaded, memory)


# --- named cases: configs ---


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_memory_slots": 10**12}, r"wrong shape: model.memory_slots.key is \(20, 32\), .* \(1000000000000, 32\)"),
        ({"num_memory_slots": 10**30}, "No adapters can be built from the config"),
        ({"num_memory_slots": "many"}, "num_memory_slots"),
        ({"num_memory_slots": -20}, "`num_memory_slots=-20` is less than the 16 patches"),
        ({"fuser_hidden_size": -4}, "`fuser_hidden_size` is -4, but must be at least 1"),
        ({"fuser_num_layers": 10**9}, "`fuser_num_layers` is 1000000000, but must be at most 1000"),
        ({"text_config": {"model_type": "llama", "num_hidden_layers": 10**9}}, "must be at most 1000"),
        ({"text_config": 5}, "text_config"),
        ({"memory_scale": float("nan")}, "`memory_scale` is nan, but must be a finite number"),
        ({"model_type": "llama"}, "says `model_type='llama'`, but that of DEHVF adapters is 'dehvf'"),
        ({"model_type": None}, "says `model_type=None`"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_config_that_no_adapters_have_is_refused(broken, change, message):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load(broken)


@pytest.mark.parametrize("text", ["", "{", "[1]", "5", "[" * 100_000, "\ufeff{}"], ids=lambda text: repr(text[:5]))
def test_a_config_that_is_no_json_object_is_refused(broken, text):
    (broken / "config.json").write_text(text)
    with pytest.raises(CLEAR_ERRORS, match="onfig"):
        DehvfForConditionalGeneration.from_pretrained(broken)


def test_a_damaged_generation_config_is_not_passed_over(broken):
    (broken / "generation_config.json").write_text("{")
    with pytest.raises(OSError, match="generation_config.json"):
        load(broken)


def test_keys_that_are_not_known_are_kept(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"from_the_future": 7}))
    assert load(broken).config.from_the_future == 7


# --- mutations: bytes ---


def mutate_bytes(data: bytes, generator: random.Random) -> bytes:
    """A few flipped bits; a part cut out, cut off, repeated, overwritten or inserted; or nothing left."""
    data = bytearray(data)
    place, length = generator.randrange(len(data)), generator.choice([1, 4, 64, len(data) // 3])
    noise = generator.randbytes(length)
    kind = generator.choice(["flip", "flip", "flip", "cut off", "cut out", "repeat", "overwrite", "insert", "end"])
    if kind == "flip":
        for _ in range(generator.choice([1, 1, 1, 8])):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    elif kind == "cut off":
        del data[generator.choice([0, 1, 7, 8, 9, place]) :]
    elif kind == "cut out":
        del data[place : place + length]
    elif kind == "repeat":
        data[place:place] = data[place : place + length]
    elif kind == "overwrite":
        data[place : place + length] = noise
    elif kind == "insert":
        data[place:place] = noise
    else:
        data += noise
    return bytes(data)


# --- mutations: safetensors, which is 8 bytes with the length of a JSON header, the header, the data ---


def split_file(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_file(header: dict, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def mutate_adapters(data: bytes, generator: random.Random) -> bytes:
    header, tensors = split_file(data)
    names = [name for name in header if name != "__metadata__"]
    first, second = generator.sample(names, 2)
    huge = generator.choice([2**31, 2**40, 2**62, 2**63, 2**64 - 1, 10**30])
    kind = generator.choice(
        ["bytes"] * 2 + ["data", "length", "offsets", "shape", "dtype", "names", "swap", "metadata"]
    )
    if kind == "bytes":
        return mutate_bytes(data, generator)
    if kind == "data":  # a legitimate file with other numbers in it, infinite ones among them
        place = 4 * generator.randrange(len(tensors) // 4)
        value = generator.choice([float("nan"), float("inf"), -float("inf"), 0.5, 1e-45])
        tensors = tensors[:place] + struct.pack("<f", value) + tensors[place + 4 :]
    elif kind == "length":
        return join_file(header, tensors, generator.choice([0, 1, 7, len(data), huge % 2**64]))
    elif kind == "offsets":
        start, end = header[first]["data_offsets"]
        header[first]["data_offsets"] = generator.choice(
            [[end, start], [start, huge], [huge, huge], [start, end + 4], [start + 4, end + 4], [-4, end], [start]]
            + [[start, start], header[second]["data_offsets"], "no", None, [float(start), float(end)]]
        )
    elif kind == "shape":
        shape = header[first]["shape"]
        header[first]["shape"] = generator.choice(
            [shape[::-1], [math.prod(shape)], [*shape, 1], [huge, huge], [0], [], [-1], [huge], "no", None, [1.5]]
        )
    elif kind == "dtype":
        header[first]["dtype"] = generator.choice(
            ["F64", "F16", "BF16", "I32", "U32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "f32", "F99", "", 1]
        )
    elif kind == "names":
        new = generator.choice([first.upper(), "", "__metadata__", "x" * 10_000, "../../etc/passwd", "\0", second])
        header[new] = header.pop(first)
    elif kind == "swap":
        header[first], header[second] = header[second], header[first]
    else:
        header["__metadata__"] = generator.choice(
            [{}, None, "no", {"sha256": "0" * 64}, {"sha256": 5}, {"format": "tf"}, {"sha256": "", "format": "pt"}]
        )
    return join_file(header, tensors)


NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def tensors_in(data: bytes) -> dict[str, torch.Tensor]:
    """What the bytes of a valid file say, without safetensors."""
    header, buffer = split_file(data)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        numbers = np.frombuffer(buffer[slice(*entry["data_offsets"])], NUMPY_TYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":
            numbers = (numbers.astype("<u4") << 16).view("<f4")
        tensors[name] = torch.from_numpy(numbers.astype("<f4")).reshape(entry["shape"])
    return tensors


class Adapters:
    """Every second file is one without SHA-256, as another program would write it."""

    number = NUM_ADAPTERS

    def __init__(self, folder: Path):
        self.folder = folder / "adapter"
        self.file = self.folder / "model.safetensors"
        # Copies, since what is read is mapped to the file
        self.saved = {name: tensor.clone() for name, tensor in load_file(self.file).items()}
        self.with_digest = self.file.read_bytes()
        save_file(self.saved, folder / "plain.safetensors", metadata={"format": "pt"})
        self.plain = (folder / "plain.safetensors").read_bytes()
        self.config = DehvfConfig.from_pretrained(self.folder)
        self.module = sys.modules[DehvfForConditionalGeneration.__module__]
        self.expected = self.module._empty_adapters(self.config, self.folder).state_dict()

    def load(self, index: int, generator: random.Random) -> str:
        original = self.plain if index % 2 else self.with_digest
        data = mutate_adapters(original, generator)
        self.file.write_bytes(data)
        if index % WHOLE_LOAD:
            loaded = self.module._load_adapters(self.folder, {})
            self.module._check_adapters(loaded, self.expected, self.folder)
        else:
            loaded = AutoModel.from_pretrained(self.folder, trust_remote_code=True).adapter_state_dict()
        written = tensors_in(data)
        assert loaded.keys() == self.saved.keys() == written.keys()
        for name, tensor in loaded.items():
            assert torch.equal(tensor.float(), written[name]) and tensor.isfinite().all(), name
        digest = (split_file(data)[0].get("__metadata__") or {}).get("sha256")
        if digest == split_file(self.with_digest)[0]["__metadata__"]["sha256"]:
            assert all(torch.equal(tensor, self.saved[name]) for name, tensor in loaded.items())
        return "loaded"


# --- mutations: configs ---


VALUES = [None, True, False, 0, -1, 1, 3, 2**31, 10**12, 10**30, -(10**30), 0.5, -0.5, 1e308, "", "no", "5", "../x"]
VALUES += [
    [],
    {},
    float("nan"),
    float("inf"),
    [1, 2],
    {"model_type": "llama"},
    {"model_type": "no"},
    "\0",
    "x" * 100_000,
]


def mutate_config(data: bytes, generator: random.Random) -> bytes:
    if generator.random() < 0.25:
        return mutate_bytes(data, generator)
    config = json.loads(data)
    if generator.random() < 0.03:
        return json.dumps(generator.choice(VALUES)).encode()
    if generator.random() < 0.02:
        return b"[" * 100_000
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        part = config
        key = generator.choice(["vision_config", "text_config", None, None])
        if isinstance(config.get(key), dict):
            part = config[key]
        name = generator.choice(list(part))
        kind = generator.choice(["value", "value", "value", "scale", "delete", "rename", "add", "copy"])
        if kind == "value":
            part[name] = copy.deepcopy(generator.choice(VALUES))
        elif kind == "scale" and isinstance(part[name], int | float):
            part[name] = generator.choice([-1, 2, 1000, 10**9, 0.1, 1.0]) * part[name]
        elif kind == "delete":
            del part[name]
        elif kind == "rename":
            part[generator.choice([name.upper(), "", "self", "__class__", "to_dict"])] = part.pop(name)
        elif kind == "copy":
            part[name] = copy.deepcopy(part[generator.choice(list(part))])
        else:
            part[generator.choice(["unknown", "dtype", "quantization_config", "auto_map", "architectures"])] = (
                copy.deepcopy(generator.choice(VALUES))
            )
    return json.dumps(config).encode()


class Configs:
    number = NUM_CONFIGS

    def __init__(self, folder: Path):
        self.folder = folder / "adapter"
        self.file = self.folder / "config.json"
        self.original = self.file.read_bytes()
        self.saved = load_file(self.folder / "model.safetensors")
        self.module = sys.modules[DehvfForConditionalGeneration.__module__]

    def load(self, index: int, generator: random.Random) -> str:
        self.file.write_bytes(mutate_config(self.original, generator))
        if index % WHOLE_LOAD:
            config = DehvfConfig.from_pretrained(self.folder)
            expected = self.module._empty_adapters(config, self.folder).state_dict()
            self.module._check_adapters(self.saved, expected, self.folder)
            return "fits"
        model = DehvfForConditionalGeneration.from_pretrained(self.folder)
        loaded = model.adapter_state_dict()
        assert loaded.keys() == self.saved.keys()
        assert all(torch.equal(tensor, self.saved[name]) for name, tensor in loaded.items())
        return "loaded"


# --- mutations: images ---


def image_files() -> list[bytes]:
    """One of each kind that is met in data sets."""
    shades = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    image = Image.fromarray(shades)
    grey16 = Image.fromarray(shades[..., 0].astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x112] = 6
    files = [(image, "PNG", {}), (image.quantize(16), "PNG", {}), (image.convert("RGBA"), "PNG", {})]
    files += [(grey16, "PNG", {}), (image, "JPEG", {"exif": turned}), (image.convert("CMYK"), "JPEG", {})]
    files += [(image, "GIF", {"save_all": True, "append_images": [image.rotate(90)]}), (image, "WEBP", {})]
    files += [(image, "BMP", {}), (image, "TIFF", {"compression": "tiff_lzw"}), (image, "PPM", {}), (image, "TGA", {})]
    contents = []
    for image, kind, options in files:
        buffer = BytesIO()
        image.save(buffer, kind, **options)
        contents.append(buffer.getvalue())
    return contents


class Images:
    number = NUM_IMAGES

    def __init__(self, folder: Path):
        self.file = folder / "image"
        self.originals = image_files()
        self.processor = tiny_processor()
        warnings.simplefilter("ignore")  # Pillow warns of damage that it can read past
        for original in self.originals:
            self.file.write_bytes(original)
            self._process()

    def _process(self):
        pixels = self.processor(images=str(self.file), text="a", return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE) and pixels.isfinite().all()

    def load(self, index: int, generator: random.Random) -> str:
        self.file.write_bytes(mutate_bytes(self.originals[index % len(self.originals)], generator))
        self._process()
        return "loaded"


# --- the process that reads them ---


def read_all(kind: type, folder: Path, connection):
    """Sends what came of each case: `loaded`, `error` or, where it is not clear, the error itself."""
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
