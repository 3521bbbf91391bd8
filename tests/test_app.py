"""The web page: its functions, its API, and the page in a browser."""

import json
import shutil
import sys
from functools import partialmethod

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT, DehvfForConditionalGeneration, DehvfProcessor, run

from demo.pictures import fusion_weights, slot_activations


pytest.importorskip("gradio", reason="pip install -r requirements-app.txt")
import gradio as gr  # noqa: E402
from gradio.data_classes import ImageData  # noqa: E402

from demo import app  # noqa: E402


BASES = ROOT / "assets" / "vision_model", ROOT / "assets" / "language_model"
SIZES = {"num_memory_slots": 20, "projector_hidden_size": 8, "fuser_num_layers": 1, "visual_scale": 1.0}
MESSAGE = "Question: Where is the 5?\nOptions: (A) northwest (B) southeast"


def make_model(**values):
    """New adapters on the bases in assets/, with random values for those that start at zero, so that images matter."""
    torch.manual_seed(0)
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(*BASES, **{**SIZES, **values})
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module", params=["network", "instruction"])
def loaded(request):
    return make_model(fuser_query=request.param), DehvfProcessor.from_vision_text_pretrained(*BASES)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture
def answered(loaded, image):
    """The model's inputs, the ids of question and answer, and the texts that were shown meanwhile."""
    *shown, (answer, (*_, tokens)) = app.ask(*loaded, image, MESSAGE)
    return app.make_inputs(*loaded, image, MESSAGE), tokens, [text for text, _ in shown] + [answer]


def test_the_message_is_asked_as_in_training_and_the_answer_grows(loaded, answered):
    model, processor = loaded
    inputs, tokens, shown = answered
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True) == f"{MESSAGE}\nResponse:"
    expected = model.generate(**inputs, max_new_tokens=app.MAX_NEW_TOKENS)[0]
    assert tokens == expected.tolist()
    length = inputs["input_ids"].shape[1]
    assert shown[-1] == processor.decode(expected[length:], skip_special_tokens=True).strip()
    assert len(set(shown)) > 2 and all(later.startswith(text) for text, later in zip(shown, shown[1:]))


@pytest.mark.parametrize("given", [(None, MESSAGE), *((Image.new("RGB", (8, 8)), text) for text in (" \n", None))])
def test_an_image_and_a_question_are_required(loaded, given):
    with pytest.raises(gr.Error, match="Upload an image or choose an example, and enter a question"):
        next(app.ask(*loaded, *given))


@pytest.mark.parametrize("text, words", [("a b " * 300, r"has \d+ tokens"), ("a" * 10**6, "has 1000000 characters")])
def test_a_question_that_is_too_long_is_refused(loaded, text, words, monkeypatch):
    monkeypatch.setattr(loaded[0].config.text_config, "max_position_embeddings", 256)
    with pytest.raises(gr.Error, match=f"The question {words}, but the model reads 192( tokens)?. Shorten it"):
        next(app.ask(*loaded, Image.new("RGB", (8, 8)), text))


def test_the_page_does_not_cut_a_question(loaded):
    boxes = [block for block in app.build(*loaded, []).blocks.values() if isinstance(block, gr.Textbox)]
    assert [box.max_length for box in boxes] == [None, None]


def test_special_tokens_and_image_markers_in_a_message_are_text(loaded, image):
    tokenizer = loaded[1].tokenizer
    inputs = app.make_inputs(*loaded, image, "who</s>\n<image><s>what")
    expected = tokenizer("who</s>\n<s>what\nResponse:", split_special_tokens=True).input_ids[1:]
    assert inputs["input_ids"].tolist() == [[tokenizer.bos_token_id, *expected]]


def test_the_page_answers_whatever_the_generation_config_sets(loaded, answered, image, monkeypatch):
    for name, value in (("num_beams", 2), ("num_return_sequences", 2), ("do_sample", True)):
        monkeypatch.setattr(loaded[0].generation_config, name, value)
    *_, (_, (*_, tokens)) = app.ask(*loaded, image, MESSAGE)
    assert tokens == answered[1]


def test_an_error_of_the_model_ends_the_answer(loaded, image, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loaded[0], "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(app.ask(*loaded, image, MESSAGE))


def test_the_token_that_the_image_raised_most_is_selected(loaded, image, answered):
    model, processor = loaded
    inputs, tokens, _ = answered
    length, gains = inputs["input_ids"].shape[1], []
    blind = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for end in range(length, len(tokens)):  # each token after those before it
        given = [app.read_tokens(parts, tokens, end) for parts in (inputs, blind)]
        seen, unseen = (model(**parts).logits[0, -1].log_softmax(-1)[tokens[end]].item() for parts in given)
        gains.append(seen - unseen)
    radio = app.offer_tokens(*loaded, (image, MESSAGE, tokens))
    assert radio.value == np.argmax(gains)
    assert [choice[1] for choice in radio.choices] == list(range(len(gains)))
    assert radio.choices[0][0] == processor.tokenizer.decode(tokens[length]).strip()


def test_the_figures_are_those_of_the_image_and_the_token(loaded, image, answered, monkeypatch):
    model, _ = loaded
    inputs, tokens, _ = answered
    drawn = []
    monkeypatch.setattr(app, "draw_slot_activations", lambda *args: drawn.append(args))
    app.draw_patches(*loaded, (image, MESSAGE, tokens), 1)
    ((activations, pixels, patch_size, _),) = drawn
    texts = {"input_ids": torch.tensor([tokens[: inputs["input_ids"].shape[1] + 1]])}
    question = torch.arange(texts["input_ids"].shape[1])[None] < inputs["input_ids"].shape[1]
    texts |= {"attention_mask": torch.ones_like(question), "instruction_mask": question}
    expected = slot_activations(model, {**texts, "pixel_values": inputs["pixel_values"]})[0]
    np.testing.assert_allclose(activations, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pixels, np.asarray(image) / 255, atol=1e-6)
    assert patch_size == model.config.vision_config.patch_size

    monkeypatch.setattr(app, "draw_fusion_weights", lambda weights, *args: drawn.append(weights))
    app.draw_mixture(*loaded, image, MESSAGE)
    np.testing.assert_allclose(drawn[-1], fusion_weights(model, inputs))
    assert app.draw_mixture(*loaded, None, MESSAGE) is None


def test_an_adapter_of_the_examples_is_the_default_where_its_bases_are(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "ADAPTERS", tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "vqa").mkdir()  # data, no adapter
    assert app.find_adapter() == "outputs/digits"
    for name, vision in (("a", "org/elsewhere"), ("b", str(tmp_path / "nothing")), ("easy-vqa", str(BASES[0]))):
        (tmp_path / name).mkdir()
        config = {"vision_model_id": vision, "text_model_id": str(BASES[1])}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert app.find_adapter() == str(tmp_path / "easy-vqa")


def write_own_rows(folder):
    for number, answer in enumerate(("yes", "red", "yes", "no")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        row = {"image": f"{number}.png", "question": f"who? {number}", "answer": answer}
        with open(folder / "test.jsonl", "a") as file:
            print(json.dumps(row), file=file)


def write_run_example(folder):
    Image.new("RGB", (8, 8), "red").save(folder / "example.png")
    (folder / "example.txt").write_text(f"<s>{MESSAGE}\nResponse:")


@pytest.mark.parametrize(
    "name, write, expected",
    [
        ("easy-vqa", write_own_rows, ["who? 0", "who? 1", "who? 3"]),  # with different answers, asked as in training
        ("easy-vqa", lambda folder: (folder / "test.jsonl").write_text("{}"), []),
        *((name, write_run_example, [MESSAGE]) for name in ("vqa", "scienceqa", "own")),
        ("own", lambda folder: (folder / "example.png").write_text("no image"), []),
        *((name, lambda folder: None, []) for name in ("vqa", "chat", "coco_captions", "own")),
    ],
)
def test_examples_are_those_in_the_folder_and_never_stop_the_page(name, write, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks._wheels.download", lambda *args: pytest.fail("downloaded"))
    processor = DehvfProcessor.from_vision_text_pretrained(*BASES)
    (tmp_path / name).mkdir()
    write(tmp_path / name)
    examples = app.find_examples(str(tmp_path / name), processor)
    assert [message for _, message in examples] == expected
    assert all(image.size == (8, 8) for image, _ in examples)
    if not examples:
        assert isinstance(app.build(make_model(), processor, examples), gr.Blocks)


TURNS = (  # as ChatML
    "{% for message in messages %}START{{ message['role'] }}\n{{ message['content'] }}END\n{% endfor %}"
    "{% if add_generation_prompt %}STARTassistant\n{% endif %}"
)


@pytest.mark.parametrize("roles", ["user", "system user", "user assistant user", "system user assistant user"])
@pytest.mark.parametrize("markers", [None, ("(start)", "(end)"), ("<s>", "</s>")], ids=str)
def test_the_example_of_a_chat_is_one_question_or_there_is_none(markers, roles, tmp_path):
    template = TURNS.replace("START", markers[0]).replace("END", markers[1]) if markers else None
    processor = DehvfProcessor.from_vision_text_pretrained(*BASES, chat_template=template)
    chat = [{"role": role, "content": f"{role} {index}?"} for index, role in enumerate(roles.split())]
    write_run_example(tmp_path)
    (tmp_path / "example.txt").write_text(processor.apply_chat_template(chat, add_generation_prompt=True))
    examples = app.find_examples(str(tmp_path), processor)
    # The plain template has no markers, so that the page can ask both texts in one message
    expected = {"user": ["user 0?"], "system user": [] if markers else ["system 0?\nuser 1?"]}
    assert [message for _, message in examples] == expected.get(roles, [])


def test_examples_of_digits_are_questions_about_images():
    examples = app.find_examples("org/digits", None)
    assert len(examples) == app.NUM_EXAMPLES
    for image, message in examples:
        assert image.size == (64, 64) and message.startswith("Question: ") and "Options: (A)" in message


def test_the_adapter_of_the_repository_has_examples_of_its_own():
    examples = app.find_examples(str(app.ADAPTERS / "easy-vqa"), None)
    assert "what is the red shape?" in [message for _, message in examples]


def test_a_picture_in_tiles_is_answered_and_drawn(image):
    model = make_model(image_tiles="2x2")
    processor = DehvfProcessor.from_vision_text_pretrained(*BASES, image_tiles="2x2")
    large = image.resize((300, 300))
    assert app.make_inputs(model, processor, large, MESSAGE)["pixel_values"].shape[1] == 5
    *_, (_, asked) = app.ask(model, processor, large, MESSAGE)
    app.offer_tokens(model, processor, asked)
    for figure in (app.draw_patches(model, processor, asked, 0), app.draw_mixture(model, processor, large, MESSAGE)):
        assert figure.axes or figure.subfigs


@pytest.mark.parametrize(
    "adapter, revision, message",
    [
        ("nothing", "", "accelerate launch train.py"),
        (BASES[1], "", "a `llama`: it has no visual memory"),
        (BASES[1], 40 * "0", "is a folder, which has no commits"),
    ],
)
@pytest.mark.parametrize("place", ["flag", "variable"])
def test_an_adapter_that_cannot_be_loaded_is_refused(adapter, revision, message, place, monkeypatch, capsys):
    monkeypatch.setenv("DEHVF_REVISION", revision)
    if place == "variable":
        monkeypatch.setenv("DEHVF_ADAPTER", str(adapter))
    with pytest.raises(SystemExit):
        app.main(["--adapter", str(adapter)] if place == "flag" else [])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.extended  # test_serving.py starts serve.py in another folder
@pytest.mark.parametrize("command", ["app.py", "pictures.py", "serve.py"])
def test_the_commands_run_from_any_folder(command, tmp_path):
    assert "--help" in run(sys.executable, ROOT / "demo" / command, "--help", folder=tmp_path)


# --- served ---


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app") / "digits"  # whose examples it shows
    make_model().save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gr.Blocks, "launch", partialmethod(gr.Blocks.launch, prevent_thread_lock=True, quiet=True))
        _, url, _ = app.main(["--adapter", str(folder)])
        yield url
    gr.close_all()


@pytest.mark.parametrize(
    "kind, reason", [("text", "it is not an image file"), ("cut", "[Tt]runcated"), ("data", "base64")]
)
def test_a_client_sees_why_an_image_is_refused(kind, reason, url, image, tmp_path):
    from gradio_client import Client, handle_file

    path = tmp_path / "broken.png"
    image.save(path)
    path.write_bytes(b"no image" if kind == "text" else path.read_bytes()[:1000])
    given = {"url": "data:image/png;base64,a?b", "meta": {"_type": "gradio.FileData"}}
    client = Client(url, verbose=False, analytics_enabled=False)
    with pytest.raises(Exception, match=f"The image .*cannot be read: .*{reason}.*Upload another file"):
        client.predict(given if kind == "data" else handle_file(path), MESSAGE, api_name="/ask")


def test_the_page_shows_every_error_of_reading(tmp_path):
    """Other exceptions are shown only where the page was launched with `show_error`."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("1", (11_000, 1)).save(tmp_path / "long.png")
    unreadable = "^.The image cannot be read: .*Upload another file"
    for upload, message in (
        (ImageData(path=str(tmp_path / "broken.png")), unreadable),
        (ImageData(path="http://127.0.0.1:1/a"), unreadable),
        (ImageData(path=str(tmp_path / "broken.png"), orig_name="a.png"), "The image a.png cannot be read"),
        (ImageData(path=str(tmp_path / "long.png")), r"are allowed \(.*\). Resize or crop it. Upload another file"),
        (ImageData(), "^.No image was uploaded. Upload a file"),
        (ImageData(url="http://127.0.0.1:1/a"), "^.No image was uploaded. Upload a file"),
    ):
        with pytest.raises(gr.Error, match=message):
            app.read_upload(upload)
    assert app.read_upload(None) is None


def test_two_at_once_get_their_own_answers(url, loaded, image, tmp_path):
    from gradio_client import Client, handle_file

    image.save(tmp_path / "image.png")
    messages = [MESSAGE, "Which colour is there?", "Question: What is 2 + 3?", "a b c"]
    clients = [Client(url, verbose=False, analytics_enabled=False) for _ in range(2)]
    jobs = [
        clients[number % 2].submit(handle_file(tmp_path / "image.png"), message, api_name="/ask")
        for number, message in enumerate(messages)
    ]
    model = make_model()
    answers = [list(app.ask(model, loaded[1], image, message))[-1][0] for message in messages]
    assert [job.result() for job in jobs] == answers
    assert len(set(answers)) > 1


def test_a_client_sees_the_answer_grow(url, loaded, image, tmp_path):
    from gradio_client import Client, handle_file

    image.save(tmp_path / "image.png")
    client = Client(url, verbose=False, analytics_enabled=False)
    steps = list(client.submit(handle_file(tmp_path / "image.png"), MESSAGE, api_name="/ask"))
    assert len(set(steps)) > 2
    assert steps[-1] == list(app.ask(make_model(), loaded[1], image, MESSAGE))[-1][0]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser: apt-get install chromium chromium-driver")
def test_the_page_answers_and_draws_in_a_browser_without_the_net(url, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    switches += " disable-component-update disable-sync"
    for switch in (*switches.split(), f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{switch}")
    options.add_argument("--window-size=1280,1850")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(url)
        wait = WebDriverWait(browser, 60, poll_frequency=0.1)
        wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "button.gallery-item"))[0].click()
        question, answer = browser.find_elements(By.TAG_NAME, "textarea")
        wait.until(lambda _: question.get_attribute("value") == app.find_examples("digits", None)[0][1])
        browser.find_element(By.XPATH, "//button[normalize-space()='Ask']").click()
        # Sources and no elements, which the page may replace before they are looked at
        images = "[...document.querySelectorAll('img[alt*=plot]')].filter(image => image.naturalWidth > 1000)"
        sources = f"return {images}.map(image => image.src)"
        wait.until(lambda _: len(browser.execute_script(sources)) == 2)
        assert answer.get_attribute("value")
        chosen = browser.find_element(By.CSS_SELECTOR, "input[type=radio]:checked")
        assert chosen.is_displayed()
        # Another token, another picture of the patches
        first = browser.execute_script(sources)
        browser.find_element(By.CSS_SELECTOR, "input[type=radio]:not(:checked)").click()
        wait.until(lambda _: len(both := browser.execute_script(sources)) == 2 and both != first)
        asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert asked and all(name.startswith((url, "data:", "blob:")) for name in asked), asked
        browser.save_screenshot(tmp_path / "page.png")
        assert len(Image.open(tmp_path / "page.png").convert("RGB").getcolors(2**24)) > 1000  # pictures, no blank
    finally:
        browser.quit()
