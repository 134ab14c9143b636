"""Addresses are written without their credentials, wherever they are written."""

import json
import logging
import sys

import pytest
from PIL import Image

from hf_guided import cli
from hf_guided.credentials import FormatterWithoutCredentials, without_credentials
from hf_guided.data import DataArguments
from hf_guided.evaluation.features.image_sets import open_images
from hf_guided.files import write_json
from hf_guided.hub import write_model_card
from hf_guided.hub.push import PushError
from hf_guided.training import train_classifier, train_diffusion
from hf_guided.training.arguments import parse_arguments, run_script
from hf_guided.training.cards import describe_data, on_hub
from hf_guided.training.loop import train
from hf_guided.training.train_classifier import ClassifierArguments

SECRET = "s3cr3t"
ADDRESSES = {
    f"https://user:{SECRET}@host/cats.parquet": "https://host/cats.parquet",
    f"https://{SECRET}@host:8080/cats.parquet": "https://host:8080/cats.parquet",
    f"HTTP://user:{SECRET}@host": "HTTP://host",
    f"https://user:p@{SECRET}@host/a@2x.png": "https://host/a@2x.png",
    f"https://host/cats.parquet?token={SECRET}": "https://host/cats.parquet",
    f"https://host/cats.parquet?v=2&X-Amz-Signature={SECRET}&X-Amz-Credential=a%2Fb#top": "https://host/cats.parquet",
    f"https://host/cb#access_token={SECRET}": "https://host/cb",
    f"https://user:{SECRET}@host/a.csv?sig={SECRET}": "https://host/a.csv",
    f"s3://key:{SECRET}/with/slash+es@bucket/cats": "s3://bucket/cats",
    f"ftp://user:{SECRET}@host/cats": "ftp://host/cats",
    f"git+ssh://user:{SECRET}@host/cats": "git+ssh://host/cats",
    f"zip://a.png::https://user:{SECRET}@host/cats.zip?sig={SECRET}": "zip://a.png::https://host/cats.zip",
    f"https:/user:{SECRET}@host/cats": "https:/host/cats",
    f"see 'https://u:{SECRET}@host/a?b={SECRET}', or ask me@host.org": "see 'https://host/a', or ask me@host.org",
    f"hf://hf_{SECRET * 5}@datasets/user/cats": "hf://datasets/user/cats",
    f"token hf_{SECRET * 5}.": "token hf_....",
}
HARMLESS = [
    "user/cats", "digits:train", "hf://datasets/user/cats@v1.0/train.parquet", "https://host:8080/a@2x.png",
    "C:/Users/me@work/cats", "git@github.com:user/cats", "https://host/a#usage", "a ? b", "./me@home/x", "",
]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_loses_its_credentials(address):
    assert without_credentials(address) == ADDRESSES[address]
    assert without_credentials(ADDRESSES[address]) == ADDRESSES[address]


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_stays(text):
    assert without_credentials(text) == text


def test_what_is_nested_is_reached_and_the_rest_stays(tmp_path):
    address = f"https://user:{SECRET}@host/cats"
    content = {address: [address, {"deep": (address, 1, None, 0.5, True)}]}
    clean = "https://host/cats"
    assert without_credentials(content) == {clean: [clean, {"deep": (clean, 1, None, 0.5, True)}]}
    write_json(content, tmp_path / "report.json")
    assert SECRET not in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize("address", [address for address in ADDRESSES if "://" in address and " " not in address])
def test_data_are_called_by_their_address_without(address):
    data = DataArguments(dataset_name=address)
    described = describe_data(data)
    assert SECRET not in f"{data.source} {described}"
    assert described["dataset_id"] is None
    with pytest.raises((ValueError, ImportError)) as refused:
        open_images(address)
    assert SECRET not in str(refused.value)


def test_a_name_on_the_hub_is_one():
    assert on_hub("user/cats-1.0_b") == "user/cats-1.0_b"
    for name in (None, "cats", "a/b/c", f"user:{SECRET}@host/cats", "user/[x](y)", "user/cats\n", "user/cäts"):
        assert on_hub(name) is None


def test_a_card_has_none(tmp_path):
    address = f"https://user:{SECRET}@host/cats.parquet?sig={SECRET}"
    text = write_model_card(
        tmp_path,
        title=f"Diffusion on {address}",
        dataset=address,
        class_names=["a", "b"],
        training={"fine-tuned from": address, address: 1, "versions": {"x": address}},
        results=[{"model": address, f"fid/{address}": 1.0}],
        dataset_id=address,
        base_model=address,
        license=address,
        summary=address,
    ).read_text()
    assert SECRET not in text
    assert "https://host/cats.parquet" in text


def test_errors_of_the_hub_have_none():
    assert SECRET not in str(PushError(f"no answer of https://storage/x?X-Amz-Signature={SECRET}"))


@pytest.fixture
def photos(tmp_path):
    for name in ("apple", "pear"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


FLAGS = [
    "--resolution", "8", "--train_batch_size", "4", "--model_channels", "32", "--channel_mult", "1",
    "--num_res_blocks", "1", "--attention_resolutions", "8", "--attention_head_dim", "16", "--validation_steps", "0",
    "--report_to", "tensorboard", "--lr_scheduler", "constant",
]  # fmt: skip


def test_a_training_writes_none_and_resumes_with_another_token(photos, tmp_path, caplog):
    """The images are loaded as they can be without a network; the address is what the flags say."""
    from hf_guided.data import load_labelled_images
    from hf_guided.training.train_classifier import ClassifierTask

    caplog.set_level(logging.INFO)
    hub_token = "hf_" + "Aa0" * 10
    for steps, token in ((1, SECRET), (2, SECRET + "2")):
        argv = [*FLAGS, "--train_data_dir", str(photos), "--output_dir", str(tmp_path / "out")]
        argv += ["--max_train_steps", str(steps), "--hub_token", hub_token]
        data_args, stages = parse_arguments({"classifier": ClassifierArguments}, argv)
        images = load_labelled_images(data_args, seed=0)
        args = stages["classifier"]
        data_args.train_data_dir, data_args.dataset_name = None, f"https://user:{token}@host/cats.parquet?sig={token}"
        images[0].name = data_args.source
        task = ClassifierTask(args, images)
        train(task, data_args)
    assert "after 1 of 2 steps" in caplog.text
    state = json.loads((tmp_path / "out/classifier/checkpoint-2/training_state.json").read_text())
    assert state["fingerprint"]["dataset_name"] == "https://host/cats.parquet"
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [path for path in written if "tfevents" in path.name]
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path
        assert hub_token.encode() not in path.read_bytes(), path
    assert SECRET not in caplog.text

    # A checkpoint of an earlier version, which holds the address as it was given, is resumed too.
    state["fingerprint"]["dataset_name"] = f"https://user:{SECRET}@host/cats.parquet?sig=1"
    older = {name: state[name] for name in ("step", "seconds", "fingerprint")}
    (tmp_path / "out/classifier/checkpoint-2/training_state.json").write_text(json.dumps(older))
    train(task, data_args)


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "ADDRESS", "ADDRESS"],
        ["sample", "ADDRESS"],
        ["upscale", "ADDRESS", "ADDRESS"],
        ["sweep", "ADDRESS", "ADDRESS"],
        ["compare", "--data", "ADDRESS", "--resolution", "8"],
        ["inspect-classifier", "ADDRESS", "ADDRESS"],
        ["convert", "ADDRESS", "--checkpoint", "ADDRESS", "--output", "out"],
        ["convert", "ADDRESS", "--to", "openai", "--output", "out.pt"],
        ["push", "ADDRESS", "ADDRESS"],
        ["train_classifier", "--dataset_name", "ADDRESS", "--resolution", "8"],
        ["train_diffusion", "--pretrained_model", "ADDRESS", "--report_to", "none"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_commands_say_none(words, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    address = f"https://user:{SECRET}@127.0.0.1:9/cats.parquet?sig={SECRET}"
    name, *flags = [address if word == "ADDRESS" else word for word in words]
    scripts = {"train_classifier": train_classifier.main, "train_diffusion": train_diffusion.main}
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit, match=r"\Aerror: ") as stopped:
        run_script(scripts[name]) if name in scripts else cli.main([name, *flags])
    out, err = capfd.readouterr()
    assert SECRET not in str(stopped.value) + out + err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_messages_on_the_screen_have_none():
    formatter = FormatterWithoutCredentials("%(message)s")
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "bad %s", (f"https://u:{SECRET}@h/x",), None)
    assert formatter.format(record) == "bad https://h/x"
