"""
Adapters on the Hub: pushed in one commit, loaded with their base models, refused, interrupted, and read offline.

The unmodified `huggingface_hub` talks over HTTP to the server of hub_server.py. It does so in processes of its own,
since it reads its settings when it is imported: an author pushes, a run of train.py pushes, a reader loads. The tests
then look at what these processes wrote down and at the requests that the server got.
"""

import json
import os
import re
import shlex
import struct
import subprocess
import sys
import textwrap

import pytest
import yaml
from hub_server import STRANGER, HubServer
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from huggingface_hub.utils import filter_repo_objects
from test_train import make_rows, scienceqa, tiny_flags  # noqa: F401
from tiny import DEHVF_SIZES, ROOT, tiny_config

import dehvf
import train
from training.flags import DEFAULT_RECIPE
from training.results import KEPT_FILES, PUSHED_FILES, command_of


pytestmark = pytest.mark.slow
CODE_FILES = sorted(file.name for file in ROOT.glob("*_dehvf.py"))
PROCESSOR_FILES = ["chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
ADAPTER_FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
LOGITS = [
    f"equal{how}" for how in ("", " when pinned", " as a further adapter", " with merged bases", " when repeated")
]
PUSHED = sorted([*CODE_FILES, *PROCESSOR_FILES, *ADAPTER_FILES])
RUN_PUSHED = sorted([*PUSHED, "results.json", ".eval_results/scienceqa.yaml"])


def run_as(user: str, hub: HubServer, folder, *command, **variables):
    """Runs Python with `command` in `folder`, where `hub` is the Hub; the cache is `folder / home`."""
    environment = {**os.environ, **hub.environment(user), "HF_HOME": str(folder / "home"), **variables}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    process = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-4000:]


def read_json(file):
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """
    The folder of an author, who pushed base models, adapters on their first commits, then base models with other
    weights, and adapters on these; further base models, which others may not read or whose download will break off,
    each with an adapter.
    """
    folder = tmp_path_factory.mktemp("author")
    code = """
        import hashlib, json, pathlib
        import torch
        from huggingface_hub import HfApi
        from tiny import DEHVF_SIZES, DehvfForConditionalGeneration, save_tiny_bases, tiny_inputs, tiny_processor
        from transformers import AutoModelForCausalLM

        def push_folder(name, folder):
            HfApi().create_repo(f"org/{name}", exist_ok=True)
            return HfApi().upload_folder(repo_id=f"org/{name}", folder_path=folder).oid

        def make_model(vision="org/vision", text="org/text", **values):
            torch.manual_seed(len(logits))
            model = DehvfForConditionalGeneration.from_vision_text_pretrained(vision, text, **values, **DEHVF_SIZES)
            for parameter in model.parameters():  # zeros would hide a wrong term
                if parameter.requires_grad and not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.2)
            return model

        def push(model, name, **options):
            commit = model.push_to_hub(f"org/{name}", **options)
            with torch.no_grad():
                logits[name] = model(**tiny_inputs()).logits
            return commit.oid

        facts, logits = {"folders": {}}, {}
        sizes = {"max_position_embeddings": 512}
        first, second = (save_tiny_bases(pathlib.Path(f"bases{seed}"), seed=seed, **sizes) for seed in (0, 1))
        named = {"vision_model_id": "org/vision", "text_model_id": "org/text", "text_model_revision": "a commit"}
        facts["vision 1"], facts["text 1"] = push_folder("vision", first[0]), push_folder("text", first[1])
        model = make_model()
        facts["adapter 1"] = push(model, "dehvf-tiny")
        logits["adapter 1"] = logits["dehvf-tiny"]
        facts["text 2"] = push_folder("text", second[1])
        model = make_model(vision_model_revision=facts["vision 1"])
        facts["vision 2"] = push_folder("vision", second[0])
        facts["adapter 2"] = push(model, "dehvf-tiny", commit_message="Train on the new language model")

        for unknown, known in (("vision", {}), ("text", {"vision_model_id": "org/vision"})):
            try:
                make_model(*first, **known).push_to_hub("org/dehvf-folders")
            except ValueError as error:
                facts["folders"][unknown] = str(error)
        push(make_model(*first, **named), "dehvf-named")
        pathlib.Path("own.md").write_text("# My own words")
        HfApi().create_repo("org/dehvf-described")
        HfApi().upload_file(repo_id="org/dehvf-described", path_or_fileobj="own.md", path_in_repo="README.md")
        push(model, "dehvf-described")
        model.save_pretrained("scored")
        own = hashlib.sha256(pathlib.Path("scored/model.safetensors").read_bytes()).hexdigest()
        facts["has scores"] = []
        pathlib.Path("scored/.eval_results").mkdir()
        pathlib.Path("scored/.eval_results/digits.yaml").write_text("[]")
        pathlib.Path("scored/old.bin").write_text("old")
        other = "of another adapter"
        for digest, options in (
            (own, {}),
            (own, {"delete_patterns": ["*.bin"]}),
            (other, {}),
            (other, {"delete_patterns": None}),
            (other, {"delete_patterns": "*.bin"}),
        ):
            scores = {"adapter_sha256": {"model.safetensors": digest}}
            pathlib.Path("scored/results.json").write_text(json.dumps(scores))
            push_folder("dehvf-scored", "scored")
            push(model, "dehvf-scored", **options)
            names = "results.json", ".eval_results/digits.yaml", "old.bin"
            facts["has scores"].append([HfApi().file_exists("org/dehvf-scored", name) for name in names])
        for tags in (["digits"], ["more"], None):
            push(model, "dehvf-branch", revision="dev", tags=tags)
        for name, pushed, options in (
            ("typo", model, {"comit_message": "Oh"}),
            ("shards", tiny_processor(), {"max_shard_size": "1GB"}),
        ):
            try:
                pushed.push_to_hub("org/dehvf-typo", **options)
            except TypeError as error:
                facts[name] = str(error)
        changed = make_model()
        changed.config.num_memory_slots = 50
        for name, pushed, options in (
            ("changed", changed, {}),
            ("future", model, {"run_as_future": True}),
            ("future", tiny_processor(), {"run_as_future": True}),
            ("folder", model, {"path_in_repo": "sub"}),
            ("folder", tiny_processor(), {"path_in_repo": "sub"}),
            ("tags", model, {"tags": "abc"}),
            ("allowed", model, {"allow_patterns": "*.safetensors"}),
            ("ignored", tiny_processor(), {"ignore_patterns": ["*.py"]}),
        ):
            try:
                pushed.push_to_hub("org/dehvf-refused", **options)
            except ValueError as error:
                facts[name] = str(error)
        tiny_processor().push_to_hub("org/dehvf-named", commit_message="Change the processor")
        processor = tiny_processor()
        processor.image_fit = "pad"
        processor.push_to_hub("org/dehvf-again")
        for merge_base in (False, True, False):
            model.push_to_hub("org/dehvf-again", merge_base=merge_base)
        changed = make_model(vision_model_revision=facts["vision 1"])
        with torch.no_grad():
            changed.lm_head.weight.mul_(2)
        changed.push_to_hub("org/dehvf-changed", merge_base=True)
        model.push_to_hub("org/dehvf-changed")
        make_model(*first).push_to_hub("org/dehvf-whole", merge_base=True)
        model.save_pretrained("merged", merge_base=True)
        logits["dehvf-merged"] = logits["dehvf-tiny"]
        push_folder("dehvf-merged", "merged")

        for seed, name in enumerate(("private", "gated", "missing", "broken"), start=2):
            vision, text = save_tiny_bases(pathlib.Path(f"bases{seed}"), seed=seed)
            if name == "broken":  # into three files, as large models are
                AutoModelForCausalLM.from_pretrained(text).save_pretrained(text, max_shard_size="60KB")
                (text / "model.safetensors").unlink()
            push_folder(name, text)
            push(make_model(text=f"org/{name}"), f"dehvf-{name}")

        torch.save(tiny_inputs(), "inputs.pt")
        torch.save(logits, "logits.pt")
        pathlib.Path("facts.json").write_text(json.dumps(facts))
    """
    run_as("writer", hub, folder, "-c", textwrap.dedent(code))
    hub.repositories["org/private"].private = True
    hub.repositories["org/gated"].gated = True
    del hub.repositories["org/missing"]
    return folder


@pytest.fixture(scope="module")
def trained(hub, pushed, tmp_path_factory):
    """The output folder of a run of train.py that ended with a push."""
    folder = tmp_path_factory.mktemp("trained")
    rows = {"train": make_rows(), "validation": make_rows(2), "test": make_rows(4)}
    for name, split in rows.items():
        (folder / "data").mkdir(exist_ok=True)
        split.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    flags = {
        **{"task": "scienceqa", "data_path": folder / "data", "text_model": "org/text"},
        **{"vision_model": pushed / "bases0" / "vision", "vision_model_id": "org/vision"},
        **{"text_model_revision": read_json(pushed / "facts.json")["text 1"], "learning_rate": 0.05, **DEHVF_SIZES},
        **{"per_device_train_batch_size": 2, "num_train_epochs": 2, "save_strategy": "epoch", "logging_steps": 1},
        **{"output_dir": folder / "run", "push_to_hub": True, "hub_model_id": "org/dehvf-trained"},
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    # As if the published test split had these rows only
    code = "import sys, train; from tasks import scienceqa; scienceqa.DATASET_ROWS = 4; train.main(sys.argv[1:])"
    run_as("writer", hub, folder, "-c", code, *words)
    return folder / "run"


@pytest.fixture(scope="module")
def loaded(hub, pushed, trained, tmp_path_factory):
    """The folder of a reader who began with an empty cache."""
    folder = tmp_path_factory.mktemp("reader")
    broken = hub.repositories["org/broken"]
    hub.interruptions[broken.commits[broken.head]["model-00002-of-00003.safetensors"]] = 6  # the client gives up
    code = """
        import contextlib, io, json, pathlib, sys
        import torch
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.utils import get_session
        from PIL import Image
        from transformers import AutoModel, AutoProcessor

        author, stranger, head_of_trained = sys.argv[1:]
        facts = json.loads(pathlib.Path(author, "facts.json").read_text())
        inputs, expected = (torch.load(pathlib.Path(author, name)) for name in ("inputs.pt", "logits.pt"))
        seen = {}

        def load(name, **options):
            return AutoModel.from_pretrained(f"org/{name}", trust_remote_code=True, **options)

        def mark(name):
            get_session().get(f"{constants.ENDPOINT}/mark/{name}")

        def equals(model, name):
            with torch.no_grad():
                return torch.equal(model(**inputs).logits, expected[name])

        mark("begin")
        seen["equal"] = equals(load("dehvf-tiny"), "dehvf-tiny")
        mark("end")
        model = load("dehvf-tiny", revision=facts["adapter 1"])
        seen["equal when pinned"] = equals(model, "adapter 1")
        seen["pinned bases"] = [model.config.vision_model_revision, model.config.text_model_revision]
        AutoProcessor.from_pretrained("org/dehvf-tiny", trust_remote_code=True)

        model.load_adapter("org/dehvf-tiny", "other", revision=facts["adapter 1"])
        model.set_adapter("other")
        seen["equal as a further adapter"] = equals(model, "adapter 1")

        Image.new("RGB", (20, 20), "red").save("image.png")
        for name in ("dehvf-tiny", "dehvf-trained"):
            card = pathlib.Path(hf_hub_download(f"org/{name}", "README.md")).read_text()
            lines = card.split("```python\\n")[1].split("```")[0]
            commit = facts["adapter 1"] if name == "dehvf-tiny" else head_of_trained
            assert lines.count('"main"') == 1, lines
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(lines.replace('"main"', repr(commit)), {})
            seen[f"card of {name}"] = printed.getvalue()

        for name in ("private", "gated", "missing"):
            for user, token in (("nobody", None), ("stranger", stranger)):
                try:
                    load(f"dehvf-{name}", token=token)
                except OSError as error:
                    seen[f"{name} to {user}"] = str(error)

        load("dehvf-private", token="hf_writer").save_pretrained("private")  # from now on it is in the cache
        mark("merged")
        seen["equal with merged bases"] = equals(load("dehvf-merged"), "dehvf-merged")
        mark("merged-end")
        try:
            load("dehvf-broken")
        except OSError as error:
            seen["broken"] = str(error)
        seen["equal when repeated"] = equals(load("dehvf-broken"), "dehvf-broken")
        pathlib.Path("seen.json").write_text(json.dumps(seen))
    """
    head = hub.repositories["org/dehvf-trained"].head
    run_as("nobody", hub, folder, "-c", textwrap.dedent(code), pushed, STRANGER, head)
    return folder


# --- pushing ---


def read_card(hub, repo_id: str) -> tuple[dict, str]:
    head, body = re.match(r"---\n(.*?)\n---\n(.*)", hub.read(repo_id, "README.md").decode(), re.DOTALL).groups()
    return yaml.safe_load(head), body


def test_a_push_is_one_commit_of_the_adapters_files(hub, pushed):
    repository = hub.repositories["org/dehvf-tiny"]
    assert repository.messages == ["initial commit", "Upload DEHVF adapter", "Train on the new language model"]
    assert sorted(hub.files("org/dehvf-tiny")) == PUSHED
    commits = [request for request in hub.requests if request.path == "/api/models/org/dehvf-tiny/commit/main"]
    first, second = (request.received for request in commits)
    assert second < 0.1 * first, "what is on the Hub already is not sent again"


def test_a_push_to_a_branch_leaves_main_alone(hub, pushed):
    repository = hub.repositories["org/dehvf-branch"]
    files = repository.commits[repository.branches["dev"]]
    assert sorted(files) == sorted([".gitattributes", *PUSHED]) and not hub.files("org/dehvf-branch")
    _, head, body = hub.contents[files["README.md"]].decode().split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["dehvf", "adapter", "vision-language", "digits", "more"]
    assert 'revision = "dev"' in body


def test_scores_of_another_adapter_are_removed(pushed):
    expected = [[True, True, True], [True, True, False], [False, False, True], [False, False, True], 3 * [False]]
    assert read_json(pushed / "facts.json")["has scores"] == expected


@pytest.mark.parametrize(
    "text",
    ['[{"task": "mmlu"}]', '{"task": "mmlu"}', '{"adapter_sha256": "abc"}', '{"adapter_sha256": {}}', "not json"],
)
def test_results_of_another_program_are_left_alone(text, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(text)
    monkeypatch.setattr(dehvf.hub, "_find_file", lambda repo_id, name: tmp_path / name)
    assert dehvf.hub.find_old_scores("org/name", "abc") is None


def test_a_processor_is_pushed_alone_and_leaves_the_card(hub, pushed):
    repository = hub.repositories["org/dehvf-named"]
    _, before, after = repository.commits.values()
    changed = [path for path in after if before.get(path) != after[path]]
    assert changed and set(changed) <= {*PROCESSOR_FILES, *CODE_FILES}
    assert repository.messages[-1] == "Change the processor"


def test_a_push_keeps_the_processor_and_merged_bases_of_the_repository(hub, pushed):
    assert json.loads(hub.read("org/dehvf-again", "processor_config.json"))["image_fit"] == "pad"
    assert json.loads(hub.read("org/dehvf-again", "config.json"))["merged_base"] is True
    assert "text_model/config.json" in hub.files("org/dehvf-again")
    # Neither needs the base models of other repositories, and the second has none there
    for name in ("again", "whole"):
        assert dehvf.hub.BASES_HERE in read_card(hub, f"org/dehvf-{name}")[1]


def test_a_push_does_not_combine_an_adapter_with_other_merged_bases(hub, pushed):
    assert "text_model/config.json" in hub.files("org/dehvf-changed")
    assert json.loads(hub.read("org/dehvf-changed", "config.json"))["merged_base"] is False


def test_a_push_that_is_refused_leaves_nothing_on_the_hub(hub, pushed):
    facts = read_json(pushed / "facts.json")
    assert "comit_message" in facts["typo"] and "max_shard_size" in facts["shards"]
    assert facts["folders"].keys() == {"vision", "text"}
    for key, message in facts["folders"].items():
        assert str(pushed / "bases0" / key) in message and f"`--{key}_model_id org/name`" in message
        assert f"model.config.{key}_model_id" in message
    assert "does not fit its config" in facts["changed"]
    assert "`run_as_future` is not supported" in facts["future"]
    assert "`path_in_repo` is 'sub', but adapters and processors are loaded from the root" in facts["folder"]
    assert "`tags` is 'abc', but must be a list of texts. Give `tags=['abc']`" in facts["tags"]
    assert "`allow_patterns` is '*.safetensors', but the files of an adapter" in facts["allowed"]
    assert "`ignore_patterns` is ['*.py']" in facts["ignored"]
    assert not {"org/dehvf-typo", "org/dehvf-folders", "org/dehvf-refused"} & hub.repositories.keys()


def test_a_base_model_in_a_folder_is_named_by_its_id(hub, pushed):
    config = json.loads(hub.read("org/dehvf-named", "config.json"))
    assert (config["vision_model_id"], config["text_model_id"]) == ("org/vision", "org/text")
    assert config["text_model_revision"] == "a commit" and config["vision_model_revision"] is None
    for path in hub.files("org/dehvf-named"):
        assert str(pushed).encode() not in hub.read("org/dehvf-named", path), f"{path} names a folder of the author"


def test_the_card_describes_the_adapter(hub, pushed):
    metadata, body = read_card(hub, "org/dehvf-tiny")
    assert metadata["base_model"] == ["org/text", "org/vision"] and metadata["base_model_relation"] == "adapter"
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "image-text-to-text")
    facts = read_json(pushed / "facts.json")
    assert f"| `org/text` | {facts['text 2']} |" in body and f"| `org/vision` | {facts['vision 1']} |" in body
    header, *_ = struct.unpack("<Q", hub.read("org/dehvf-tiny", "model.safetensors")[:8])
    size = (hub.files("org/dehvf-tiny")["model.safetensors"] - 8 - header) // 4
    assert f"{size:,} trained parameters" in body
    assert "- transformers 5" in body and "- torch 2" in body
    assert hub.read("org/dehvf-described", "README.md") == b"# My own words", "a card of the author's own stays"
    assert hub.files("org/dehvf-described").keys() == set(PUSHED)


def test_scores_are_written_as_the_hub_reads_them(tmp_path):
    fields = {"dataset_revision": "a" * 40, "date": "2026-01-31", "notes": "500 rows"}
    dehvf.hub.write_eval_results(tmp_path, "org/data", "default", 81.5, **fields)
    (file,) = tmp_path.rglob("*.yaml")
    assert file.relative_to(tmp_path).match(".eval_results/default.yaml")
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert entry == EvalResultEntry("org/data", "default", 81.5, **fields)


# --- loading ---


def requests_after(hub, mark: str = "end", next_mark: str | None = None) -> list:
    """The requests of a reader since it set a mark, see `loaded`."""
    paths = [request.path for request in hub.requests]
    return hub.requests[paths.index(f"/mark/{mark}") : next_mark and paths.index(f"/mark/{next_mark}")]


def test_a_pushed_adapter_gives_the_same_logits_and_can_be_saved_again(loaded):
    seen = read_json(loaded / "seen.json")
    assert [what for what in seen if what.startswith("equal") and seen[what]] == LOGITS
    assert sorted(path.name for path in (loaded / "private").iterdir()) == [n for n in PUSHED if n != "README.md"]


def test_a_fresh_process_with_an_empty_cache_fetches_nothing_twice(hub, loaded):
    requests = requests_after(hub, "begin", "end")
    files = {name: hub.files(f"org/{name}") for name in ("dehvf-tiny", "vision", "text")}
    weights = [sizes["model.safetensors"] for sizes in files.values()]
    assert sorted(request.sent for request in requests if "/lfs/" in request.path) == sorted(weights)
    read = ["config.json", "generation_config.json", *CODE_FILES]
    others = sum(files["dehvf-tiny"][name] for name in read) + 8_000  # configs of the bases, descriptions
    assert sum(request.sent for request in requests) <= sum(weights) + others


def test_each_repository_is_read_at_the_commit_that_it_is_pinned_to(hub, pushed, loaded):
    facts, seen = read_json(pushed / "facts.json"), read_json(loaded / "seen.json")
    assert seen["pinned bases"] == [facts["vision 1"], facts["text 1"]], "both have moved on since"
    config = json.loads(hub.read("org/dehvf-tiny", "config.json"))
    pins = [config["vision_model_revision"], config["text_model_revision"]]
    assert pins == [facts["vision 1"], facts["text 2"]] and facts["vision 2"] == hub.repositories["org/vision"].head


def test_a_merged_repository_is_all_that_is_read(hub, loaded):
    paths = [request.path for request in requests_after(hub, "merged", "merged-end")]
    assert paths and not [path for path in paths if "/org/vision" in path or "/org/text" in path]


@pytest.mark.parametrize("name", ["dehvf-tiny", "dehvf-trained"])
def test_the_example_on_a_card_works_at_a_pinned_commit(loaded, name):
    assert "Response:" in read_json(loaded / "seen.json")[f"card of {name}"]


@pytest.mark.parametrize("name, status", [("private", 404), ("gated", 403), ("missing", 404)])
def test_a_base_model_that_cannot_be_read_is_named_with_what_to_do(loaded, name, status):
    for user, expected in (("nobody", 401), ("stranger", status)):
        message = read_json(loaded / "seen.json")[f"{name} to {user}"]
        assert message.startswith(f"The language model org/{name}, which the adapter needs, could not be loaded: ")
        assert "ask for access" in message and "`text_model=`" in message
        assert f"{expected} Client Error" in message and ("Cannot access gated repo" in message) == (name == "gated")


def test_an_unreachable_server_is_a_clear_error(loaded):
    message = read_json(loaded / "seen.json")["broken"]
    assert message.startswith("The language model org/broken, which the adapter needs, could not be loaded: ")
    assert "try again" in message and "Server disconnected" in message


def test_everything_works_offline_after_the_first_load(hub, pushed, loaded):
    before = len(hub.requests)
    code = """
        import sys, pathlib
        import torch
        from transformers import AutoModel, AutoProcessor

        inputs, expected = (torch.load(pathlib.Path(sys.argv[1], name)) for name in ("inputs.pt", "logits.pt"))
        for name in ("org/dehvf-tiny", "org/dehvf-broken", "merged"):
            model = AutoModel.from_pretrained(name, trust_remote_code=True)
            with torch.no_grad():
                logits = model(**inputs).logits
            if name == "org/dehvf-tiny":
                model.save_pretrained("merged", merge_base=True)
            if name != "org/dehvf-broken":
                processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
                assert type(processor).__name__ == "DehvfProcessor"
            assert torch.equal(logits, expected["dehvf-broken" if "broken" in name else "dehvf-tiny"]), name
    """
    run_as("nobody", hub, loaded, "-c", textwrap.dedent(code), pushed, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before


# --- training ---


def test_a_run_pushes_its_adapter_once_and_nothing_else(hub, trained):
    assert hub.repositories["org/dehvf-trained"].messages[1:] == ["Upload DEHVF adapters"]
    assert sorted(hub.files("org/dehvf-trained")) == RUN_PUSHED
    assert list(trained.glob("checkpoint-*/optimizer.pt")), "there was more to push"
    assert {"training_args.bin", "predictions.jsonl", "example.png"} <= {path.name for path in trained.iterdir()}
    private = ["train.json", "test.json", "log.txt", "example.txt", "run.json", "data/config.json"]
    assert not list(filter_repo_objects(private, allow_patterns=PUSHED_FILES, ignore_patterns=KEPT_FILES))
    template = read_json(trained / "results.json")["template"]
    assert "{prompt}" in template and make_rows()[0]["question"] not in template
    assert hub.read("org/dehvf-trained", "model.safetensors") == (trained / "model.safetensors").read_bytes()


def test_the_card_of_a_run_names_its_data_scores_and_command(hub, pushed, trained):
    metadata, body = read_card(hub, "org/dehvf-trained")
    results = read_json(trained / "results.json")
    assert metadata["base_model"] == ["org/text", "org/vision"] and metadata["datasets"] == ["derek-thomas/ScienceQA"]
    (model,) = metadata["model-index"]
    (result,) = model["results"]
    assert model["name"] == "dehvf-trained" and result["dataset"]["split"] == "test"
    (entry,) = parse_eval_result_entries(yaml.safe_load(hub.read("org/dehvf-trained", RUN_PUSHED[0])))
    assert entry.value == result["metrics"][0]["value"] == round(results["scores"]["average"], 2)
    assert entry.dataset_id == "derek-thomas/ScienceQA"
    commit = read_json(pushed / "facts.json")["text 1"]
    assert f"| `org/text` | {commit} |" in body and "| `org/vision` | not pinned |" in body
    assert f"{results['trained_parameters']:,} trained parameters" in body
    assert "recipes/digits.yaml" in body and "--learning_rate 0.05" in body
    assert f"- transformers {results['versions']['transformers']}" in body


# --- what is refused or fails, without a server ---

FLAGS = ["--push_to_hub", "true", "--vision_model", "org/vision", "--text_model", "org/text"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vision_model", "assets/vision_model"], "`vision_model_id` is 'assets/vision_model'.*--vision_model_id"),
        (["--adapter", "folder"], "`text_model_id` is '/of/the/author'.*--text_model_id"),
        (["--method", "lavin"], "does not support `--method lavin`"),
        (["--hub_strategy", "every_save"], "pushed once, with their results"),
    ],
)
def test_a_push_that_could_not_be_used_is_refused_before_training(tmp_path, monkeypatch, flags, message):
    tiny_config(vision_model_id="org/vision", text_model_id="/of/the/author").save_pretrained(tmp_path / "folder")
    monkeypatch.setattr(train, "load_processor", lambda *_: pytest.fail("too late"))
    flags = [str(tmp_path / "folder") if flag == "folder" else flag for flag in flags]
    with pytest.raises(ValueError, match=message):
        train.main([*FLAGS, *flags, "--output_dir", str(tmp_path / "run")])


def test_a_push_that_fails_loses_nothing_and_can_be_repeated(tmp_path, monkeypatch, scienceqa):  # noqa: F811
    def upload(delete_patterns, **_):
        assert delete_patterns == ["old scores"]
        raise OSError("the Hub is away")

    monkeypatch.setattr("tasks.scienceqa.DATASET_ROWS", 4)
    # A card that a person has written is kept
    monkeypatch.setattr(dehvf.hub, "find_card", lambda *_, **__: (ModelCard("# My own words"), None))
    monkeypatch.setattr(dehvf.hub, "find_old_scores", lambda *_, **__: ["old scores"])
    monkeypatch.setattr("training.results.upload_folder", upload)
    monkeypatch.setattr(dehvf.hub, "open_repository", lambda name, *_: name)
    ids = {"vision_model_id": "org/vision", "text_model_id": "org/text", "hub_model_id": "org/name"}
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="the Hub is away") as raised:
        train.main(tiny_flags(tmp_path, scienceqa[0], folder, push_to_hub=True, **ids))
    assert "scores" in read_json(folder / "results.json") and (folder / "model.safetensors").is_file()
    (note,) = raised.value.__notes__
    assert f"complete in {folder}" in note
    _, _, repo_id, source, target, *words = shlex.split(note.splitlines()[-1])
    assert (repo_id, source, target) == ("org/name", str(folder), ".")
    patterns = {flag: [word for before, word in zip(words, words[1:]) if before == flag] for flag in words[::2]}
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    # `hf upload` chooses by the same function as `upload_folder`
    chosen = filter_repo_objects(names, allow_patterns=patterns["--include"], ignore_patterns=patterns["--exclude"])
    assert sorted([*chosen, "README.md"]) == RUN_PUSHED


def test_a_token_does_not_get_into_the_recorded_command():
    for given in (["--hub_token", "hf_secret"], ["--hub_token=hf_secret"], ["--hub-token", "hf_secret"]):
        flags = [*given, "--seed", "1"]
        command = command_of(DEFAULT_RECIPE, flags)
        assert command == "accelerate launch train.py recipes/digits.yaml --hub_token ... --seed 1"
