"""Real processes on the CPU: each engine and launch file gives what a single process gives."""

import ast
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import datasets
import pytest
import torch
from PIL import Image
from processes import growth_while_loading, run_in_processes, torchrun_environments, train_and_look
from safetensors.torch import load_file
from test_start import SIZES, check_start
from test_train import FEW_LAYERS, make_rows, read_predictions, tiny_flags
from tiny import ROOT, save_tiny_bases

from baselines import METHODS


ENGINES = {
    "DDP": None,
    "ZeRO-1": "zero1.json",
    "ZeRO-2": "ds_config.json",
    "ZeRO-3": "launch/zero3.json",
    "ZeRO-3 offload": "launch/zero3-offload.json",
    "FSDP2": None,
}
# Each process draws its own dropout, so there is none. A small gradient that is nothing but rounding (softmax does not
# feel a bias of its keys) becomes a step of a whole rate in Adam, so `adam_epsilon` is not that small.
FLAGS = {
    **{"max_steps": 3, "learning_rate": 0.02, "adam_epsilon": 1e-4, "lr_scheduler_type": "constant"},
    **{"warmup_steps": 0, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": "true"},
    "train_sampling_strategy": "sequential",
}
OF_DEHVF = {"memory_dropout": 0.0, "vision_adapter_dropout": 0.0, "fuser_lr_ratio": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of several lengths. Every fourth has an image, so that with 2 rows a process the second never sees one."""
    folder = tmp_path_factory.mktemp("distributed")

    def change(row, index):
        return {"image": row["image"] if index % 4 == 1 else None, "question": "what is it? " * (1 + index % 3)}

    rows = make_rows(16).map(change, with_indices=True)
    # The second process has none in evaluation either
    image = next(row["image"] for row in rows if row["image"] is not None)
    test = make_rows(4).map(lambda row, index: {"image": image if index < 2 else None}, with_indices=True)
    datasets.DatasetDict(train=rows, test=test).save_to_disk(str(folder / "data"))
    save_tiny_bases(folder, **FEW_LAYERS, max_position_embeddings=512)
    stage_1 = json.loads((ROOT / "ds_config.json").read_text())
    stage_1["zero_optimization"]["stage"] = 1
    (folder / "zero1.json").write_text(json.dumps(stage_1))
    return folder


@pytest.fixture(scope="module")
def train_on(folder):
    """`train_on(engine, num_processes, name, **flags)` -> what each process saw, the saved adapters, the answers."""

    def train_on(engine, num_processes, name, **flags):
        output = folder / name.replace(" ", "-")
        if ENGINES.get(engine):
            file = ENGINES[engine]
            flags["deepspeed"] = folder / file if file == "zero1.json" else ROOT / file
        environments = torchrun_environments(num_processes)
        if engine == "FSDP2":
            launched = accelerate_launch("fsdp2", "--num_processes", num_processes)
            environments = [settings | own for settings, own in zip(launched, environments, strict=True)]
        own = {} if flags.get("method") in METHODS else OF_DEHVF
        flags = tiny_flags(folder, folder / "data", output, **{**FLAGS, **own, **flags})
        seen = run_in_processes(train_and_look, environments, flags, engine == "FSDP2")
        return seen, load_file(output / "model.safetensors"), read_predictions(output)

    return train_on


@pytest.fixture(scope="module")
def single(train_on):
    return train_on(None, 1, "single", per_device_train_batch_size=4)


# In one piece, since processes write at once
PRINT_ENVIRONMENT = """
import os
own = {n: v for n, v in os.environ.items() if n.startswith(("RANK", "WORLD_SIZE", "ACCELERATE_", "FSDP_"))}
os.write(1, f"{own}\\n".encode())
"""


@cache
def accelerate_launch(config: str, *flags) -> list[dict]:
    """Starts a launch file of this repository. Returns the environment of each process that it starts, by rank."""
    file = ROOT / "launch" / f"{config}.yaml"
    words = ["-m", "accelerate.commands.launch", "--config_file", file, *flags, "--no_python", sys.executable]
    started = subprocess.run(
        [sys.executable, *map(str, words), "-c", PRINT_ENVIRONMENT], capture_output=True, text=True
    )
    assert started.returncode == 0, started.stderr[-4000:]
    environments = [ast.literal_eval(line) for line in started.stdout.splitlines() if line.startswith("{")]
    return sorted(environments, key=lambda environment: int(environment.get("RANK", 0)))


def assert_same(adapters, expected):
    assert adapters.keys() == expected.keys()
    assert max((adapters[name] - tensor).abs().max() for name, tensor in expected.items()) < 1e-4


@pytest.mark.slow
def test_a_new_adapter_has_its_start_under_zero_3(train_on):
    _, adapters, _ = train_on("ZeRO-3", 2, "start", max_steps=1, learning_rate=0, **SIZES)
    check_start(adapters)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [pytest.param(name, marks=[pytest.mark.extended] * (name in ("ZeRO-1", "ZeRO-3 offload"))) for name in ENGINES],
)
def test_each_engine_gives_the_result_of_a_single_process(engine, single, train_on):
    """The engine with gradient checkpointing, the single process without: that gives the same, too."""
    seen, adapters, answers = train_on(engine, 2, engine, activation_checkpointing="true")
    (alone,), expected, expected_answers = single
    for process in seen:
        assert process["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert process["adapter_dtypes"] == process["base_dtypes"] == {torch.float32}
        assert process["activation_checkpointing"] and not alone["activation_checkpointing"]
        assert bool(process["divided_by_fsdp"]) == (engine == "FSDP2")
        assert bool(process["divided_by_deepspeed"]) == engine.startswith("ZeRO-3")
    assert [process["batch_has_image"] for process in seen] == [[True] * 3, [False] * 3], "no hang without any image"
    assert len(alone["losses"]) == 3 and alone["losses"][-1] < alone["losses"][0] - 0.5
    assert_same(adapters, expected)
    assert answers == expected_answers
    trained = sum(tensor.numel() for tensor in expected.values())
    (line,) = (line for line in alone["printed"].splitlines() if "parameters are trained" in line)
    assert line.startswith(f"{trained:,} of ") and line in seen[0]["printed"]


@pytest.mark.slow
def test_deepspeed_clips_gradients_even_if_its_config_does_not_say_so(folder, train_on):
    config = json.loads((ROOT / "ds_config.json").read_text())
    del config["gradient_clipping"]
    (folder / "unclipped.json").write_text(json.dumps(config))
    # With so large an epsilon, steps of Adam are in proportion to the gradients
    flags = {"adam_epsilon": 1, "learning_rate": 0.5, "max_steps": 2, "max_grad_norm": 0.01}
    (alone,), expected, _ = train_on(None, 1, "clipped", per_device_train_batch_size=4, **flags)
    seen, adapters, _ = train_on(None, 2, "clipped by DeepSpeed", deepspeed=folder / "unclipped.json", **flags)
    assert seen[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert_same(adapters, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", ["ZeRO-3", *(pytest.param(engine, marks=pytest.mark.extended) for engine in ("DDP", "FSDP2"))]
)
def test_processes_whose_rows_have_different_numbers_of_images_stay_in_step(engine, folder, train_on):
    data = folder / "several"
    data.mkdir(exist_ok=True)
    for colour in ("red", "blue"):
        Image.new("RGB", (20, 20), colour).save(data / f"{colour}.png")
    # Of the first process two images and one, then one, then none; of the second none, then two, then one
    numbers = [2, 1, 0, 0, 1, 0, 2, 2, 0, 0, 1, 1]
    images = [["red.png", "blue.png"][:number] for number in numbers]
    rows = [
        {"question": "what? " * (1 + row % 3), "answer": "a", "images": images} for row, images in enumerate(images)
    ]
    for split, part in (("train", rows), ("test", rows[:4])):
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    flags = {"task": "vqa", "data_path": data, "max_images": 2}
    (alone,), expected, expected_answers = train_on(None, 1, "several", per_device_train_batch_size=4, **flags)
    seen, adapters, answers = train_on(engine, 2, f"several {engine}", **flags)
    for process in seen:
        assert process["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert_same(adapters, expected)
    assert expected["model.memory_slots.image_value"].any() and answers == expected_answers


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, values",
    [
        ("llava-lora", {}),
        *(
            pytest.param(name, values, marks=pytest.mark.extended)
            for name, values in {
                "lavin": {"lavin_image_tokens": 2},
                "llama-adapter": {"adaption_prompt_layers": 1, "adaption_image_layers": 2},
                "llama-adapter-v2": {},
                "adem-vl": {},
            }.items()
        ),
    ],
)
def test_a_baseline_is_trained_and_evaluated_under_zero_2_where_one_process_has_no_image(method, values, train_on):
    seen, _, answers = train_on("ZeRO-2", 2, f"ZeRO-2 {method}", method=method, max_steps=1, **values)
    assert [process["batch_has_image"] for process in seen] == [[True], [False]] and len(answers) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine, dtype",
    [
        pytest.param("DDP", "float16", marks=pytest.mark.extended),
        pytest.param("ZeRO-2", "float16", marks=pytest.mark.extended),
        pytest.param("ZeRO-3", "bfloat16", marks=pytest.mark.extended),
        pytest.param("FSDP2", "bfloat16", marks=pytest.mark.extended),
    ],
)
def test_each_engine_keeps_adapters_in_float32_on_bases_in_half_precision(engine, dtype, single, train_on):
    seen, adapters, _ = train_on(engine, 2, f"{engine} {dtype}", dtype=dtype)
    for process in seen:
        assert process["base_dtypes"] == {getattr(torch, dtype)} and process["adapter_dtypes"] == {torch.float32}
        assert process["losses"] == pytest.approx(single[0][0]["losses"], abs=0.02)
        assert process["losses"] != pytest.approx(single[0][0]["losses"], abs=1e-5)
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.extended
def test_accumulated_gradients_are_those_of_the_whole_batch(train_on):
    """In random order, which is the same for any number of processes."""
    order = {"train_sampling_strategy": "random", "max_steps": 2}
    runs = {
        "8 x 1": (None, 1, 8, 1),
        "1 x 8": (None, 1, 1, 8),
        "ZeRO-2 2 x 1 x 4": ("ZeRO-2", 2, 1, 4),
        "ZeRO-3 2 x 2 x 2": ("ZeRO-3", 2, 2, 2),
    }
    results = {}
    for name, (engine, processes, rows, steps) in runs.items():
        flags = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, **order}
        seen, adapters, _ = train_on(engine, processes, name, **flags)
        results[name] = seen[0]["losses"], adapters
    losses, expected = results.pop("8 x 1")
    for name, (others, adapters) in results.items():
        assert others == pytest.approx(losses, abs=1e-4), name
        assert_same(adapters, expected)


def test_the_trainers_own_half_precision_keeps_adapters_in_float32(single, train_on):
    (alone,), adapters, _ = train_on(None, 1, "autocast", per_device_train_batch_size=4, bf16="true")
    assert alone["adapter_dtypes"] == alone["base_dtypes"] == {torch.float32}
    assert alone["losses"] == pytest.approx(single[0][0]["losses"], abs=0.02)
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}


def test_under_zero_3_no_process_ever_holds_a_whole_base(folder, tmp_path):
    """Half of it each, and one parameter that is being divided."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 16}
    _, text = save_tiny_bases(tmp_path, max_position_embeddings=512, head_dim=64, **sizes)
    size = sum(file.stat().st_size for file in text.glob("*.safetensors"))
    assert size > 2e8
    flags = tiny_flags(tmp_path, folder / "data", tmp_path / "output", deepspeed=ROOT / "launch" / "zero3.json")
    for growth in run_in_processes(growth_while_loading, torchrun_environments(2), flags):
        assert 0.45 * size < growth < 0.7 * size


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, flags, ranks",
    [
        pytest.param("cpu", (), [None], marks=pytest.mark.extended),
        pytest.param("one-gpu", (), [None], marks=pytest.mark.extended),
        ("gpus", ("--num_processes", 2), ["0", "1"]),
        ("fsdp2", ("--num_processes", 2), ["0", "1"]),
    ],
)
def test_each_launch_file_starts_its_processes(config, flags, ranks):
    environments = accelerate_launch(config, *flags)
    assert [environment.get("RANK") for environment in environments] == ranks
    for environment in environments:
        assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
        assert environment.get("WORLD_SIZE", "1") == str(len(ranks))
        assert (environment.get("ACCELERATE_USE_CPU") == "True") == (config == "cpu")
        assert (environment.get("FSDP_VERSION") == "2") == (config == "fsdp2")


@pytest.mark.slow
def test_the_launch_file_for_machines_starts_one_world_on_all_of_them():
    flags = ("--num_processes", 4, "--main_process_port", torchrun_environments(2)[0]["MASTER_PORT"])
    with ThreadPoolExecutor() as machines:
        started = machines.map(lambda rank: accelerate_launch("machines", *flags, "--machine_rank", rank), (0, 1))
        environments = [environment for machine in started for environment in machine]
    assert [environment["RANK"] for environment in environments] == ["0", "1", "2", "3"]
    assert {environment["WORLD_SIZE"] for environment in environments} == {"4"}
