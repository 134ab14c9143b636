"""The demo: its page in a real browser, what it answers to anyone, and what it makes of pipelines of every kind."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from hf_guided import (
    ADMScheduler,
    BigGANGenerator,
    ClassConditionalVAE,
    ClassifierGuidedPipeline,
    GANPipeline,
    VAEPipeline,
)
from hf_guided.cli import main
from hf_guided.demo.gate import MAX_BODY, MAX_PER_SESSION, NOT_WAITED_FOR, SECONDS_TO_LISTEN
from hf_guided.demo.page import build_demo, launch_demo
from hf_guided.demo.session import LATENTS_TRADE_OFFS, MAX_SEED, Session, guidance_trade_off
from hf_guided.evaluation.features.extractors import ModelFeatures
from hf_guided.generation.samples import to_picture
from hf_guided.generation.sampling import to_8_bit
from hf_guided.guidance import AutoGuidance, ClassifierFreeGuidance, ClassifierGuidance

CHROMIUM = (Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver"))
NAMES = {0: "zero", 1: "<b>one</b>", 2: "two"}
SMALL = {"sample_size": 8, "in_channels": 1, "channel_mult": (1,), "attention_resolutions": ()}


@pytest.fixture(scope="module")
def make_pipe(tiny_unet, tiny_classifier):
    """Makes a pipeline of tiny models; one of 8x8 pixels and three named classes, by default."""

    def make(scheduler=None, classifier=True, names=NAMES, defaults=None, guide=False, **unet):
        options = {**SMALL, "out_channels": 2, "num_class_embeds": 3, "null_class_label": True, **unet}
        guides = tiny_classifier(**{**SMALL, "channel_mult": [1]}, num_labels=3, id2label=NAMES) if classifier else None
        return ClassifierGuidedPipeline(
            tiny_unet(**options),
            scheduler or ADMScheduler(solver_order=2),
            guides,
            guide_unet=tiny_unet(**{**options, "num_res_blocks": 2}) if guide else None,
            id2label=names,
            sampling_defaults=defaults or {"num_inference_steps": 10, "guidance_scale": 3.0},
        )

    return make


@pytest.fixture(scope="module")
def judge(tiny_classifier):
    """A classifier that is not the one that guides."""
    names = {0: "two", 1: "zero", 2: "<b>one</b>"}
    model = tiny_classifier(**{**SMALL, "channel_mult": [1, 1]}, num_labels=3, id2label=names)
    return ModelFeatures(model, "judge")


# The page


@pytest.fixture(scope="module")
def folder(make_pipe, judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_pipe().save_pretrained(folder / "dots/pipeline")
    judge.model.save_pretrained(folder / "judge/model")
    judge.processor.save_pretrained(folder / "judge/model")
    return folder


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(folder):
    """`hf-guided demo` as a process, and where it is."""
    port = free_port()
    command = [sys.executable, "-m", "hf_guided.cli", "demo", str(folder / "dots/pipeline")]
    command += ["--judge", str(folder / "judge/model"), "--port", str(port)]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "GRADIO_SERVER_NAME": "0.0.0.0"}
    with (folder / "errors").open("w") as errors:
        process = forked.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    process.line, process.errors = process.stdout.readline(), folder / "errors"
    process.url, process.port = f"http://127.0.0.1:{port}/", port
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not all(path.exists() for path in CHROMIUM):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM[0])
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += f" disable-component-update disable-sync user-data-dir={tmp_path_factory.mktemp('chromium')}"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(CHROMIUM[1])))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, server):
    return Page(browser, server.url)


class Page:
    """The page, freshly loaded, of a desktop's width or a phone's."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url
        self.resize(1280, 900)
        browser.get(url)
        self.wait(lambda: self.find("#sample"))

    def resize(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def wait(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while not (result := condition()):
            assert time.monotonic() < end, f"waited in vain; the page says: {self.text('body')}"
            time.sleep(0.02)
        return result

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def text(self, selector):
        return self.browser.execute_script(f"return document.querySelector({selector!r})?.innerText ?? ''")

    def pictures(self, selector):
        return self.browser.execute_script(f"return [...document.querySelectorAll('{selector} img')].map(i => i.src)")

    def click(self, selector):
        self.wait(lambda: self.find(selector) and self.find(selector)[0].is_enabled())
        self.find(selector)[0].click()

    def set(self, selector, value):
        """Types into a field."""
        field = self.find(f"{selector} input[type=number], {selector} input:not([type]), {selector} textarea")[0]
        field.send_keys("\ue009a\ue000", str(value), "\ue004")  # Control-A, the value, Tab

    def choose(self, selector, name):
        self.find(f"{selector} input")[0].click()
        options = self.wait(lambda: [option for option in self.find("li[role=option]") if option.text.strip() == name])
        options[0].click()

    def open_comparison(self):
        next(tab for tab in self.find("button[role=tab]") if tab.text.startswith("Effect ")).click()
        self.wait(lambda: self.find("#compare")[0].is_displayed())

    def errors(self):
        return self.text(".toast-wrap") or self.text("[data-testid=toast-body]")


def picture_of(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))


def test_generate_shows_the_denoising_and_the_pipelines_own_images(page, make_pipe, judge, tmp_path):
    page.choose("#class", NAMES[1])
    page.set("#pictures", 3)
    page.set("#seed", 5)
    page.click("#sample")
    seen = []

    def is_done():
        pictures = page.pictures("#sample-pictures")
        if pictures and pictures not in seen:
            seen.append(pictures)
        return "Done in" in page.text("#sample-status")

    page.wait(is_done)
    assert len(seen) > 4  # of 10 steps
    samples = make_pipe()([1], 3, generator=torch.Generator().manual_seed(5), output_type="latent").images
    expected = [to_picture(image) for image in to_8_bit(samples).permute(0, 2, 3, 1).numpy()]
    shown = [picture_of(url) for url in page.pictures("#sample-pictures")]
    assert [picture.tobytes() for picture in shown] == [picture.tobytes() for picture in expected]
    assert shown[0].format == "PNG"
    assert page.find("#sample-pictures img")[0].size["width"] == 96  # twelve times as large as it is

    right = judge(to_8_bit(samples)).probabilities.argmax(axis=1) == 2  # the judge's id of the class
    assert f"Classified correctly: {right.sum()} of 3 ({right.mean():.0%})" in page.text("#sample-status")
    marks = [mark.text for mark in page.find("#sample-pictures figcaption")]
    assert [mark == "✓" for mark in marks] == right.tolist()
    assert all(re.fullmatch(r"✓|✗ (zero|two)", mark) for mark in marks)

    page.browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.click("#sample-pictures a")
    page.click("#sample-status a")
    files = page.wait(lambda: len(found := sorted(tmp_path.glob("*.png"))) == 2 and found)
    assert [file.name for file in files] == ["b-one-b-seed5-1.png", "b-one-b-seed5.png"]
    assert Image.open(files[0]).tobytes() == expected[0].tobytes()
    assert Image.open(files[1]).width > 3 * 56

    asked = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    asked = [url for url in asked if url.startswith("http")]
    assert asked
    assert all(url.startswith(page.url) for url in asked)  # it works without a network


def test_comparison_shows_the_same_noise_at_each_scale(page, make_pipe, judge):
    page.set("#pictures", 2)
    page.open_comparison()
    page.set("#scales", "0, 2.5, 10")
    page.click("#compare")
    page.wait(lambda: "Done in" in page.text("#compare-status"))
    pipe = make_pipe()
    for row, scale in enumerate((0, 2.5, 10)):
        options = {"guidance_scale": scale, "condition_unet": False, "output_type": "latent"}
        samples = to_8_bit(pipe([0], 2, generator=torch.Generator().manual_seed(0), **options).images)
        shown = [np.asarray(picture_of(url)) for url in page.pictures(f"#row-{row}")]
        assert np.array_equal(np.stack(shown), samples[:, 0])
        right = int((judge(samples).probabilities.argmax(axis=1) == 1).sum())
        text = page.text(f"#row-{row}")
        assert text.startswith(f"scale {scale:g}" + (", no guidance" if scale == 0 else ""))
        assert f"Classified correctly: {right} of 2" in text
    assert not page.pictures("#row-3")
    assert picture_of(page.find("#compare-status a")[0].get_attribute("href")).height > 3 * 56

    page.set("#scales", "0, much")
    page.click("#compare")
    page.wait(lambda: "A scale must be a number from 0 to 30, not much." in page.errors())
    page.set("#scales", "1")
    page.click("#compare")  # and the page still works
    page.wait(lambda: "Done in" in page.text("#compare-status") and not page.pictures("#row-1"))


def slow_request(num_images=16, steps=250):
    """Seconds of work: class, pictures, seed, solver, steps, scale, conditional."""
    return ["zero", num_images, 0, "DDPM, as published", steps, 3, True]


def test_cancel_stops_the_walk(page, server):
    page.choose("#solver", "DDPM, as published")
    page.wait(lambda: page.text("#steps").startswith("Steps, 2 to 250"))
    page.set("#pictures", 16)
    page.set("#steps", 250)
    page.click("#sample")
    page.wait(lambda: page.text("#sample-status").startswith("Step "))
    assert not page.find("#sample")[0].is_enabled()
    page.click("#sample-cancel")
    page.wait(lambda: "Cancelled." in page.text("#sample-status"))
    began = time.monotonic()
    page.set("#pictures", 1)
    page.set("#steps", 2)
    page.click("#sample")
    page.wait(lambda: "Done in" in page.text("#sample-status"))
    assert time.monotonic() - began < 3  # the cancelled one would take longer, and both wait for one lock
    page.wait(lambda: not page.find("#sample-cancel")[0].is_enabled())  # by an event after the last images
    page.browser.get("about:blank")


def test_two_people_are_served_in_turn(page, server):
    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, server, "sample", slow_request(steps=60))
        page.click("#sample")
        page.wait(lambda: re.search(r"queue: 1/1", page.text("#sample-status")))
        page.wait(lambda: "Done in" in page.text("#sample-status"))
        assert "Done in" in first.result()[0]
        # a visitor may leave the queue
        first = pool.submit(ask, server, "sample", slow_request(steps=60))
        page.click("#sample")
        page.wait(lambda: "queue:" in page.text("#sample-status"))
        page.click("#sample-cancel")
        page.wait(lambda: "Cancelled." in page.text("#sample-status"))
        assert "Done in" in first.result()[0]


def test_a_reload_ends_the_request(page, server):
    page.choose("#solver", "DDPM, as published")
    page.wait(lambda: page.text("#steps").startswith("Steps, 2 to 250"))
    page.set("#pictures", 16)
    page.set("#steps", 250)
    page.click("#sample")
    page.wait(lambda: page.text("#sample-status").startswith("Step "))
    page.browser.refresh()
    began = time.monotonic()
    assert "Done in" in ask(server, "sample", list(GOOD.values()))[0]
    assert time.monotonic() - began < 3
    page.browser.get("about:blank")


def test_everything_fits_on_a_phone(page):
    page.resize(390, 844)
    page.click("#sample")
    page.wait(lambda: "Done in" in page.text("#sample-status"))
    check_fits(
        page, "class pictures seed new-seed solver steps scale sample-conditional sample sample-cancel sample-pictures"
    )
    page.open_comparison()
    page.click("#compare")
    page.wait(lambda: "Done in" in page.text("#compare-status"))
    check_fits(page, "scales compare-conditional compare compare-cancel row-0 row-3")
    page.click("#new-seed")
    page.wait(lambda: page.find("#seed input")[0].get_attribute("value") != "0")


def check_fits(page, names):
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= 390
    ends = (
        "return Math.max(...[...document.querySelectorAll('img, a, input')].map(e => e.getBoundingClientRect().right))"
    )
    assert page.browser.execute_script(ends) <= 390  # what overflows may be cut off instead
    for name in names.split():
        element = page.find(f"#{name}")[0]
        left, width = element.rect["x"], element.rect["width"]
        assert element.is_displayed(), name
        assert left >= 0, name
        assert left + width <= 390, name
        assert width > 80, name


def begin(server, name, values):
    """Asks over HTTP, as anyone may."""
    request = urllib.request.Request(
        f"{server.url}gradio_api/call/{name}",
        json.dumps({"data": values}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["event_id"]


def answer(server, name, event):
    """The last of what comes: the values, or the error."""
    with urllib.request.urlopen(f"{server.url}gradio_api/call/{name}/{event}", timeout=60) as response:
        text = response.read().decode()
    *_, last = re.findall(r"event: (\w+)\ndata: (.*)\n", text)
    assert last[0] in ("complete", "error")
    return json.loads(last[1]) if last[0] == "complete" else json.loads(last[1])["error"]


def ask(server, name, values):
    """Asks, and waits for the answer."""
    return answer(server, name, begin(server, name, values))


def post(server, route, body, source="127.0.0.1"):
    """Status and JSON of the answer to any request, from one of this machine's addresses."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, 30, source_address=(source, 0))
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", f"/gradio_api/{route}", text, {"Content-Type": "application/json"})
    with contextlib.closing(connection), connection.getresponse() as response:
        return response.status, json.loads(response.read())


def get_status(server, path):
    try:
        with urllib.request.urlopen(server.url + path, timeout=60) as response:
            response.read()
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def index_of(server, name):
    """The number of a function, by which the page calls it."""
    with urllib.request.urlopen(f"{server.url}config", timeout=30) as response:
        functions = json.load(response)["dependencies"]
    return next(function["id"] for function in functions if function["api_name"] == name)


GOOD = {"name": "two", "num_images": 2, "seed": 3, "solver": "UniPC", "steps": 3, "scale": 2.0, "conditional": True}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("name", ["three", {"a": 1}, None, 7], "There is no class"),
        (
            "num_images",
            [0, 17, 1.5, float("nan"), "2", None, [2], True, 10**400],
            "must be a whole number from 1 to 16",
        ),
        ("seed", [-1, MAX_SEED + 1, float("inf")], f"The seed must be a whole number from 0 to {MAX_SEED:,}"),
        ("solver", ["Newton", [], None], "There is no solver"),
        ("steps", [1, 10**9, float("nan"), "x" * 10_000], "must be a whole number from 2 to 100"),
        (
            "scale",
            [-0.1, 31, float("nan"), float("-inf"), None, {}],
            "The guidance scale must be a number from 0 to 30",
        ),
        ("conditional", ["yes", 1, None], "is true or false"),
    ],
)
def test_bad_values_are_told_and_survived(server, name, values, message):
    for value in values:
        told = answer(server, "sample", begin(server, "sample", list({**GOOD, name: value}.values())))
        assert message in told, value
        assert len(told) < 250


def test_the_server_is_as_it_was(server):
    before = answer(server, "sample", begin(server, "sample", list(GOOD.values())))
    told = answer(server, "compare", begin(server, "compare", [*list(GOOD.values())[:5], "1,2,3,4,5,6,7", True]))
    assert "Give 1 to 6 scales" in told
    assert answer(server, "sample", begin(server, "sample", list(GOOD.values())))[1] == before[1]
    pictures = [picture_of(url) for url in re.findall(r'src="([^"]+)"', before[1])]
    assert [picture.size for picture in pictures] == [(8, 8), (8, 8)]


@pytest.mark.parametrize(
    "route", ["run/sample", "run/predict", "run/sample/", "api/sample", "api/predict", "call/v2/sample"]
)
@pytest.mark.parametrize("more", [{}, {"session_hash": "direct"}, {"event_id": "direct"}])
def test_nothing_is_computed_outside_the_queue(server, route, more):
    more = {**more, "fn_index": index_of(server, "sample")} if "predict" in route else more
    status, told = post(server, route, {"data": list(GOOD.values()), **more})
    assert status == 404
    assert "queue" in told["detail"] or "no such route" in told["detail"]


@pytest.mark.parametrize("route", ["upload", "component_server", "process_recording", "vibe-code", "stream/x", "login"])
def test_nothing_can_be_sent_to_other_routes(server, route):
    assert post(server, route, {"data": []}) == (404, {"detail": "This demo has no such route."})
    assert post(server, route, b"x" * 10**6)[0] == 404


@pytest.mark.parametrize(
    "route",
    [
        "file=/etc/hostname",
        "file=pyproject.toml",
        "file=https://127.0.0.1/",
        "file/etc/hostname",
        "%66ile=pyproject.toml",
        "proxy=https://127.0.0.1/",
        "upload_progress?upload_id=x",
        "deep_link?session_hash=x",
        "monitoring/summary",
        "queue/data?session_hash=x",
        "call/sample/x",
    ],
)
def test_nothing_else_can_be_read(server, route):
    assert get_status(server, f"gradio_api/{route}") == 404
    assert get_status(server, "monitoring") == 403


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"data": [1, 2]}, "takes 7 values"),
        ({"data": [*GOOD.values(), 1]}, "takes 7 values"),
        ({"data": "abcdefg"}, "takes 7 values"),
        ({"data": {str(i): i for i in range(7)}}, "takes 7 values"),
        ({}, "takes 7 values"),
        (b"[]", "takes 7 values"),
        (b"[" * 50_000, "takes 7 values"),
        (b"\xff\x00", "takes 7 values"),
        ({"data": list(GOOD.values()), "session_hash": "x" * 101}, "at most 100 characters"),
        ({"data": list(GOOD.values()), "session_hash": 7}, "at most 100 characters"),
        ({"data": ["x" * MAX_BODY] * 7}, "at most 65,536 bytes"),
        (b"x" * 10**7, "at most 65,536 bytes"),
    ],
)
def test_calls_that_cannot_be_right_are_refused_in_a_sentence(server, body, message):
    for route in ("call/sample", "run/sample"):
        status, told = post(server, route, body)
        assert status in (400, 413)
        assert message in told["detail"]
    assert "Traceback" not in server.errors.read_text()


def test_functions_that_are_not_there_cannot_be_called(server):
    body = {"data": [], "session_hash": "other"}
    quick = index_of(server, "change_solver")  # which does not queue
    for index in (10**6, -1, "3", [3], True, 3.0, quick):
        assert post(server, "queue/join", {**body, "fn_index": index})[0] == 400
        if index != quick:
            assert post(server, "run/predict", {**body, "fn_index": index})[0] == 400
    for route in ("call/nothing", "run/nothing", "call/change_solver", "queue/join", "queue/other"):
        assert post(server, route, body) == (400, {"detail": "This demo has no such function."})
    assert "Traceback" not in server.errors.read_text()


def test_the_quick_functions_refuse_bad_values_too(server):
    index = index_of(server, "change_solver")
    for values, message in {
        ("Newton", 3): "There is no solver",
        (None, 3): "There is no solver",
        ("UniPC", "x"): "The number of steps must be a number from 2",
        ("UniPC", float("nan")): "The number of steps must be a number from 2",
    }.items():
        assert message in post(server, "run/predict", {"data": list(values), "fn_index": index})[1]["error"]
    assert "Traceback" not in server.errors.read_text()


def test_requests_that_nobody_reads_give_way(server):
    values = [*slow_request()[:5], "0,1,2,3,4,5", True]
    unread = [begin(server, "compare", values) for _ in range(3)]
    began = time.monotonic()
    assert "Done in" in ask(server, "sample", list(GOOD.values()))[0]
    assert time.monotonic() - began < SECONDS_TO_LISTEN + 3  # each would take minutes
    time.sleep(SECONDS_TO_LISTEN)  # the last of them had as long, too
    assert "Done in" in ask(server, "sample", list(GOOD.values()))[0]  # whoever comes drops what nobody waits for
    for event in unread:
        assert answer(server, "compare", event) == NOT_WAITED_FOR
        assert get_status(server, f"gradio_api/call/compare/{event}") == 404  # which is not waited for, either


def test_a_session_has_few_requests_under_way_and_others_take_turns(server):
    values = slow_request(num_images=8, steps=20)
    join = {"data": values, "fn_index": index_of(server, "sample"), "session_hash": "greedy"}
    with ThreadPoolExecutor(20) as pool:
        told = [status for status, _ in pool.map(lambda _: post(server, "queue/join", join), range(20))]
        assert sorted(told) == [200] * MAX_PER_SESSION + [429] * (20 - MAX_PER_SESSION)
        assert "wait for one of them or cancel it" in post(server, "call/sample", join)[1]["detail"]
        stream = pool.submit(get_status, server, "gradio_api/queue/data?session_hash=greedy")
        done = []
        other = post(server, "queue/join", {**join, "session_hash": "other"}, source="127.0.0.2")[1]["event_id"]
        pool.submit(answer, server, "sample", other).add_done_callback(lambda _: done.append("other"))
        stream.add_done_callback(lambda _: done.append("greedy"))
    assert done == ["other", "greedy"]  # before the second request of the first one


def test_it_listens_to_this_machine_alone(server):
    assert server.line.strip().endswith(f"is at {server.url} until Ctrl-C.")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=5)
    socket.create_connection(("127.0.0.1", server.port), timeout=5).close()


def test_ctrl_c_ends_it_in_one_sentence(server):
    begin(server, "sample", slow_request())
    time.sleep(0.5)  # it is running
    server.send_signal(signal.SIGINT)
    server.wait(timeout=10)
    assert server.errors.read_text().strip().splitlines()[-1] == "Stopped."
    assert "Traceback" not in server.errors.read_text()


# Pipelines of every kind


def make_request(session, **changes):
    return session.check_request(*{**{k: v for k, v in GOOD.items() if k != "scale"}, **changes}.values())


def previews_of(session, scale=2.0, **changes):
    return list(session.sample(make_request(session, **changes), scale))


def test_every_solver_walks_and_leaves_the_pipeline_alone(make_pipe):
    pipe = make_pipe()
    config, timesteps = dict(pipe.scheduler.config), pipe.scheduler.timesteps.clone()
    session = Session(pipe)
    assert next(iter(session.solvers)) == "SDE-DPM-Solver++(2M)"
    ends = {}
    for name in session.solvers:
        previews = previews_of(session, solver=name, steps=5)
        assert [preview.step for preview in previews] == [1, 2, 3, 4, 5]
        ends[name] = previews[-1].images
        nearer = [(preview.images.float() - ends[name]).abs().mean() for preview in previews]
        assert nearer[0] > nearer[3], name  # what is shown on the way is not noise to the end
    assert len({images.numpy().tobytes() for images in ends.values()}) == len(session.solvers) == 7
    assert dict(pipe.scheduler.config) == config
    assert torch.equal(pipe.scheduler.timesteps, timesteps)
    generator = torch.Generator().manual_seed(3)
    published = make_pipe(ADMScheduler(algorithm_type="ddim"))
    images = published(
        "two", 2, respacing="ddim5", guidance_scale=2.0, generator=generator, output_type="latent"
    ).images
    assert torch.equal(ends["DDIM, as published"], to_8_bit(images))


def test_a_closed_walk_gives_way_to_the_next(make_pipe):
    session = Session(make_pipe())
    began = time.monotonic()
    slow = session.sample(make_request(session, num_images=16, solver="DDPM, as published", steps=250), 2.0)
    next(slow)
    slow.close()
    previews_of(session, steps=2)
    assert time.monotonic() - began < 2


def test_a_pipeline_of_diffusers_parts(make_pipe):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_small")
    session = Session(make_pipe(scheduler, classifier=False, out_channels=1, null_class_label=False))
    assert list(session.solvers) == ["DDPMScheduler", "Euler ancestral", "Euler", "UniPC"]
    assert (session.guidance, session.can_drop_label) == (None, False)
    for name in session.solvers:
        assert previews_of(session, None, solver=name)[-1].is_last


def shown(blocks):
    """Names of what is to be seen on a page."""
    components = [block["props"] for block in blocks.get_config_file()["components"]]
    return {props["elem_id"] for props in components if props.get("elem_id") and props.get("visible", True)}


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({}, set()),
        ({"null_class_label": False}, {"sample-conditional", "compare-conditional"}),
        ({"num_class_embeds": None, "null_class_label": False}, {"sample-conditional", "compare-conditional"}),
        ({"classifier": False}, {"scale", "sample-conditional", "compare-conditional"}),
        (
            {"classifier": False, "num_class_embeds": None, "null_class_label": False, "names": None},
            {"class", "scale", "sample-conditional", "compare-conditional"},
        ),
        ({"defaults": {"guidance": [ClassifierFreeGuidance(2.0)]}}, {"sample-conditional", "compare-conditional"}),
        (
            {"defaults": {"guidance": [AutoGuidance(2.0), ClassifierGuidance(1.0)]}, "guide": True},
            {"scale", "sample-conditional", "compare-conditional"},
        ),
    ],
    ids=[
        "all",
        "always conditional",
        "unconditional UNet",
        "no classifier",
        "no classes",
        "classifier-free",
        "two kinds",
    ],
)
def test_controls_that_do_nothing_are_not_there(make_pipe, options, hidden):
    pipe = make_pipe(**{"defaults": {"num_inference_steps": 3}, **options})
    blocks = build_demo(pipe)
    assert {"class", "scale", "sample-conditional", "compare-conditional"} - shown(blocks) == hidden
    session = Session(pipe)
    changes = {"name": next(iter(session.label_of), None), "solver": next(iter(session.solvers))}
    assert previews_of(session, 1.5 if session.guidance else None, **changes)[-1].is_last


# Images sampled from latents in one step

THEIR_WARNINGS = "ignore::DeprecationWarning:gradio.*"  # which a server in this process brings along


@pytest.fixture
def serve(monkeypatch):
    """Serves a page from a thread of this process, and says where."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    opened = []

    def serve_blocks(blocks):
        opened.append(blocks)
        port = free_port()
        return SimpleNamespace(url=launch_demo(blocks, port=port), port=port)

    yield serve_blocks
    for blocks in opened:
        blocks.close()


@pytest.mark.filterwarnings(THEIR_WARNINGS)
@pytest.mark.parametrize(
    ("leaving", "name"), [("stream of a call", "sample"), ("stream of a session", "compare"), ("cancel", "sample")]
)
def test_who_leaves_is_not_computed_for(make_pipe, serve, monkeypatch, leaving, name):
    monkeypatch.setattr("hf_guided.demo.session._SECONDS_BETWEEN", 60)  # the next preview is six steps away
    pipe = make_pipe()
    steps = []

    def step(*_):
        steps.append(time.monotonic())
        time.sleep(0.1)

    pipe.unet.register_forward_pre_hook(step)
    server = serve(build_demo(pipe))
    index = index_of(server, name)
    values = ["zero", 1, 0, "DDPM, as published", 100, {"sample": 3, "compare": "0, 1"}[name], True]
    body = {"data": values, "fn_index": index, "session_hash": "leaving"}
    events = [post(server, "queue/join", body)[1]["event_id"] for _ in range(2)]  # one runs, one waits
    path = f"call/{name}/{events[0]}" if leaving == "stream of a call" else "queue/data?session_hash=leaving"
    with socket.create_connection(("127.0.0.1", server.port)) as stream:
        stream.sendall(f"GET /gradio_api/{path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        while len(steps) < 3:
            time.sleep(0.01)
        left = time.monotonic()
        if leaving == "cancel":
            for event in reversed(events):
                post(server, "cancel", {"session_hash": "leaving", "fn_index": index, "event_id": event})
        else:
            stream.close()
        time.sleep(0.8)
    assert sum(when > left for when in steps) <= 2  # those that begin until the leaving is noticed
    before = len(steps)
    assert "Done in" in ask(server, "sample", ["two", 1, 0, "UniPC", 2, 3, True])[0]
    assert len(steps) - before == 2  # and what waited is gone


def make_at_once(pipeline_class, model_class):
    torch.manual_seed(0)
    shape = {"sample_size": 8, "image_channels": 1, "num_class_embeds": 3, "model_channels": 8, "channel_mult": (1, 2)}
    return pipeline_class(model_class(**shape).eval(), id2label=NAMES)


def made(pipe, name, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    return to_8_bit(pipe(name, 2, generator=generator, output_type="latent", **options).images)[:, 0]


def pixels(urls):
    return np.stack([np.asarray(picture_of(url)) for url in urls])


@pytest.mark.filterwarnings(THEIR_WARNINGS)
def test_a_vae_has_a_page_without_steps(judge, serve):
    pipe = make_at_once(VAEPipeline, ClassConditionalVAE)
    blocks = build_demo(pipe, judge)
    assert shown(blocks) >= {"class", "pictures", "seed", "scale", "scales", "sample", "compare"}
    assert not shown(blocks) & {"solver", "steps", "sample-conditional", "compare-conditional"}
    server = serve(blocks)
    status, pictures = answer(server, "sample", begin(server, "sample", ["two", 2, 3, 0.5]))
    images = made(pipe, "two", 3, temperature=0.5)
    assert np.array_equal(pixels(re.findall(r'src="([^"]+)"', pictures)), images)
    assert not np.array_equal(images, made(pipe, "two", 3))
    right = int((judge(images[:, None]).probabilities.argmax(axis=1) == 0).sum())
    assert f"Classified correctly: {right} of 2" in status
    for values, message in {
        ("two", 2, 3, 2.1): "The temperature must be a number from 0 to 2, not 2.1.",
        ("two", 2, 3, None): "The temperature must be a number from 0 to 2, not None.",
        ("two", 17, 3, 1): "must be a whole number from 1 to 16",
        ("three", 2, 3, 1): "There is no class three",
    }.items():
        assert message in answer(server, "sample", begin(server, "sample", list(values)))
    told = answer(server, "compare", begin(server, "compare", ["two", 2, 3, "1, 3"]))
    assert "A temperature must be a number from 0 to 2, not 3.0." in told


@pytest.mark.filterwarnings(THEIR_WARNINGS)
def test_a_gans_rows_are_of_one_noise_and_fit_on_a_phone(browser, serve):
    pipe = make_at_once(GANPipeline, BigGANGenerator)
    page = Page(browser, serve(build_demo(pipe)).url)
    page.resize(390, 844)
    page.set("#pictures", 2)
    page.click("#sample")
    page.wait(lambda: "Done in" in page.text("#sample-status"))
    assert np.array_equal(pixels(page.pictures("#sample-pictures")), made(pipe, "zero", 0))
    check_fits(page, "class pictures seed scale sample sample-cancel sample-pictures")
    page.open_comparison()
    page.click("#compare")
    page.wait(lambda: "Done in" in page.text("#compare-status"))
    check_fits(page, "scales compare row-0 row-3")
    for row, truncation in enumerate((None, 2, 1, 0.3)):
        images = made(pipe, "zero", 0, truncation=truncation)
        assert np.array_equal(pixels(page.pictures(f"#row-{row}")), images), truncation
        name = "truncation 4, off" if truncation is None else f"truncation {truncation:g}"
        assert page.text(f"#row-{row}").strip() == name
    page.browser.get("about:blank")


def test_what_cannot_be_shown_is_refused(make_pipe, judge, tiny_unet, tiny_classifier, monkeypatch):
    pipe = make_pipe()
    with pytest.raises(ValueError, match="upsamples images, which the demo does not support"):
        Session(ClassifierGuidedPipeline(tiny_unet(low_res_channels=3), ADMScheduler()))
    with pytest.raises(ValueError, match="guide is the pipeline's own classifier"):
        Session(pipe, ModelFeatures(pipe.classifier, "guide"))
    other = tiny_classifier(**{**SMALL, "channel_mult": [1, 1]}, num_labels=2, id2label={0: "cat", 1: "dog"})
    with pytest.raises(ValueError, match=r"other cannot evaluate this pipeline's samples: .* has no class named"):
        Session(pipe, ModelFeatures(other, "other"))
    with pytest.raises(ValueError, match="no classes, so that judge cannot evaluate it"):
        Session(make_pipe(classifier=False, num_class_embeds=None, null_class_label=False, names=None), judge)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hf_guided.demo")
    monkeypatch.delitem(sys.modules, "hf_guided.demo.page")
    with pytest.raises(SystemExit, match=re.escape('install it with: pip install "hf-guided[demo]"')):
        main(["demo", "anything"])


def test_equal_class_names_are_made_unique(make_pipe):
    session = Session(make_pipe(names={0: "crane", 1: "crane", 2: "heron"}))
    assert session.label_of == {"crane (0)": 0, "crane (1)": 1, "heron": 2}
    assert make_request(session, name="crane (1)").label == 1


def test_values_of_a_trade_off_are_read_in_their_order(make_pipe):
    scales = guidance_trade_off(make_pipe(), ClassifierGuidance(1.0))
    assert scales.values_of("10, 0,1.5") == [10, 0, 1.5]
    for text in ("", "1,", "1;2", "nan", "-1", "1e9", None, ["1"]):
        with pytest.raises(ValueError, match=r"A scale must be|Give 1 to 6 scales"):
            scales.values_of(text)
    for trade_off in (scales, *LATENTS_TRADE_OFFS.values()):
        assert trade_off.neutral in trade_off.values_of(trade_off.usual)  # of a row that is as without it
