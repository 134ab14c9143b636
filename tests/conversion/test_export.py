"""`hf-guided convert --to openai`: what was converted comes back bit by bit, and what was trained here goes out."""

import json
import re
import sys

import forked
import pytest
import torch
from conversion_helpers import SCHEDULE, contents, needed_flags, spell
from hub_server import HubServer, User
from test_openai import CHECKPOINTS, CLASSIFIERS, UNETS, convert_openai_classifier, convert_openai_unet

import hf_guided.conversion.export as export_module
from hf_guided import (
    ADMForImageClassification,
    ADMScheduler,
    ADMUNet2DModel,
    ClassifierGuidedPipeline,
    ClassifierGuidedUpscalePipeline,
)
from hf_guided.conversion import to_openai_state_dict
from hf_guided.conversion.flags import parse_flags
from hf_guided.conversion.openai import published_shapes
from hf_guided.conversion.published import kind_of

TOKEN = "hf_" + "Aa0" * 10


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == torch.float32
        assert torch.equal(actual[name], tensor), name  # equal shapes, too


@pytest.mark.parametrize("name", [*UNETS, *CLASSIFIERS])
@pytest.mark.parametrize("new_order", [False, True])
def test_the_round_trip_is_exact_in_either_order(reference, published_order, name, new_order):
    stored = reference(name)
    convert = convert_openai_classifier if name in CLASSIFIERS else convert_openai_unet
    options = {"super_resolution": True} if name == "superres" else {}
    model = convert(stored.weights, stored.config, **options)
    exported = to_openai_state_dict(model, new_order)
    assert list(exported) == published_order(name)
    if new_order == stored.config.get("use_new_attention_order", False):
        assert_same_bits(exported, stored.weights)
    elif stored.config.get("num_heads") != 1:  # a single head's rows lie alike in both
        assert any(not torch.equal(exported[key], stored.weights[key]) for key in exported)
    again = convert(exported, {**stored.config, "use_new_attention_order": new_order}, **options)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [*UNETS, *CLASSIFIERS])
def test_files_come_back_bit_by_bit(reference, published_order, checkpoint, convert, tmp_path, name):
    stored = reference(name)
    convert("--checkpoint", checkpoint(name), "--flags", needed_flags(stored.config), "--output", tmp_path / "out")
    told = convert(tmp_path / "out", "--to", "openai", "--output", tmp_path / "back.pt")
    exported = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_bits(exported, stored.weights)
    assert list(exported) == published_order(name)
    assert (tmp_path / "back.pt").stat().st_size < 1.1 * (tmp_path / f"{name}.pt").stat().st_size
    flags = re.search(r'FLAGS="(.*)"', told)[1]
    assert parse_flags(flags).get("use_new_attention_order", False) == stored.config.get(
        "use_new_attention_order", False
    )
    # what was printed describes the file: converting it again gives the same folder
    if name in CLASSIFIERS:
        heads = stored.config.get("num_head_channels") or 0
        flags += f" --classifier_num_head_channels {heads}" if heads else f" --num_heads {stored.config['num_heads']}"
    convert("--checkpoint", tmp_path / "back.pt", "--flags", flags, "--output", tmp_path / "again")
    first, second = contents(tmp_path / "out"), contents(tmp_path / "again")
    differing = {key for key in first if first[key] != second.get(key)}
    assert differing <= {"README.md", "openai_flags.json"}


def test_a_pipeline_gives_both_files(reference, checkpoint, convert, tmp_path):
    flags = needed_flags(reference("sampler_unet").config) + " --classifier_num_head_channels 16"
    files = ["--checkpoint", checkpoint("sampler_unet"), "--classifier", checkpoint("sampler_classifier")]
    convert(*files, "--flags", flags, "--output", tmp_path / "out")
    (tmp_path / "deep").mkdir()
    back = ["--output", tmp_path / "deep" / "unet.pt", "--classifier", tmp_path / "deep" / "classifier.pt"]
    told = convert(tmp_path / "out", "--to", "openai", *back)
    for kind in ("unet", "classifier"):
        exported = torch.load(tmp_path / "deep" / f"{kind}.pt", weights_only=True)
        assert_same_bits(exported, reference(f"sampler_{kind}").weights)
    assert "MODEL_FLAGS=" in told
    assert "CLASSIFIER_FLAGS=" in told
    assert "NUM_CLASSES = 5" in told
    assert "num_head_channels=16" in told
    assert "not exported" not in told
    told = convert(tmp_path / "out", "--to", "openai", "--output", tmp_path / "alone.pt")
    assert "The classifier of" in told
    assert "was not exported; rerun with --classifier classifier.pt" in told


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_published_names_flags_are_printed(reference_json, full_size, convert, tmp_path, monkeypatch, name):
    """The flags of a published model come back as its README has them; names and shapes in the published order."""

    def without_weights(cls, folder):
        config = cls.load_config(folder) if cls is ADMUNet2DModel else cls.config_class.from_pretrained(folder)
        with torch.device("meta"):
            return cls.from_config(config) if cls is ADMUNet2DModel else cls(config)

    for model_class in (ADMUNet2DModel, ADMForImageClassification):
        monkeypatch.setattr(model_class, "from_pretrained", classmethod(without_weights))
    exported = {}
    monkeypatch.setattr(export_module, "_save", lambda state_dict, path: (exported.update(state_dict), path.touch()))
    convert(name, "--checkpoint", full_size(name), "--output", tmp_path / "out")
    told = convert(tmp_path / "out", "--to", "openai", "--output", tmp_path / "back.pt")

    published = reference_json("published_checkpoints")[name]
    assert [(key, list(tensor.shape)) for key, tensor in exported.items()] == list(published["tensors"].items())
    defaults = {} if kind_of(name) == "classifier" else {"dropout": 0.0}
    given = {key: value for key, value in published["flags"].items() if value != -1}  # -1 means "not given"
    if "num_head_channels" in given:  # it wins over the number of heads
        given.pop("num_heads", None)
    schedule = {"diffusion_steps": published["diffusion_steps"], "noise_schedule": published["noise_schedule"]}
    expected = parse_flags(spell({**defaults, **given, **schedule}))
    assert parse_flags(re.search(r'FLAGS="(.*)"', told)[1]) == expected
    assert "Note:" not in told


def test_what_was_trained_here_goes_out_with_notes(tiny_unet, tiny_classifier, convert, tmp_path, error):
    unet = tiny_unet(null_class_label=True, in_channels=1, out_channels=1, channel_mult=(1, 1.5, 2), model_channels=64)
    scheduler = ADMScheduler(variance_type="fixed_small", prediction_type="v_prediction", num_train_timesteps=500)
    ClassifierGuidedPipeline(unet, scheduler).save_pretrained(tmp_path / "own")
    told = convert(tmp_path / "own", "--to", "openai", "--output", tmp_path / "model.pt")
    for note in (
        "set NUM_CLASSES = 6",
        "Class 5 is the null label",
        "set in_channels=1",
        "predicts v_prediction",
        "--sigma_small",
        "only whole numbers",
    ):
        assert note in told
    flags = parse_flags(re.search(r'MODEL_FLAGS="(.*)"', told)[1])
    assert flags["diffusion_steps"] == 500
    assert flags["rescale_timesteps"] is False
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    config = {
        "image_size": 16, "in_channels": 1, "out_channels": 1, "model_channels": 64, "channel_mult": (1, 1.5, 2),
        "num_res_blocks": 1, "attention_resolutions": [2], "num_classes": 6, "num_head_channels": 16,
        "use_scale_shift_norm": True, "resblock_updown": True,
    }  # fmt: skip
    again = convert_openai_unet(weights, config)
    x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([3, 400]), torch.tensor([1, 5])
    with torch.no_grad():
        assert error(again(x, t, y).sample, unet(x, t, y).sample) < 1e-6

    tiny_classifier().save_pretrained(tmp_path / "classifier")
    told = convert(tmp_path / "classifier", "--to", "openai", "--output", tmp_path / "classifier.pt")
    assert "out_channels=3" in told
    unet.save_pretrained(tmp_path / "unet alone")
    told = convert(tmp_path / "unet alone", "--to", "openai", "--output", tmp_path / "alone.pt")
    assert "add its --diffusion_steps and --noise_schedule" in told


def test_what_the_published_code_cannot_express_is_refused(tiny_unet, tiny_classifier, refused, tmp_path):
    def export(model, name, *rest):
        model.save_pretrained(tmp_path / name)
        return refused(tmp_path / name, "--to", "openai", "--output", tmp_path / "model.pt", *rest)

    grey = tiny_unet(low_res_channels=1)
    assert "takes 3 and 1" in export(ClassifierGuidedUpscalePipeline(grey, ADMScheduler()), "grey")
    assert "heads of one width" in export(tiny_classifier(num_heads=2, attention_resolutions=[16, 8]), "heads")
    assert "attention pooling for square images" in export(tiny_classifier(sample_size=[16, 8]), "wide")
    pipe = ClassifierGuidedPipeline(tiny_unet(), ADMScheduler())
    assert "has no classifier" in export(pipe, "bare", "--classifier", tmp_path / "classifier.pt")
    alone = export(tiny_classifier(), "alone", "--classifier", tmp_path / "classifier.pt")
    assert "is a classifier itself" in alone
    (tmp_path / "nothing").mkdir()
    out = ["--to", "openai", "--output", tmp_path / "model.pt"]
    assert "is not a pipeline, UNet or classifier" in refused(tmp_path / "nothing", *out)
    assert "There is no folder" in refused(tmp_path / "nowhere", *out)
    assert "takes the folder" in refused(*out)
    assert "leave --flags out" in refused(tmp_path / "bare", *out, "--flags", SCHEDULE)
    assert "leave --dtype out" in refused(tmp_path / "bare", *out, "--dtype", "fp32")
    guided = ClassifierGuidedPipeline(tiny_unet(), ADMScheduler(), tiny_classifier(num_labels=5))
    same = tmp_path / "bare" / ".." / "model.pt"
    assert f"both name {tmp_path / 'model.pt'}" in export(guided, "guided", "--classifier", same)
    assert not list(tmp_path.glob("*.pt"))
    (tmp_path / "model.pt").write_text("mine")
    assert "model.pt exists already" in refused(tmp_path / "bare", *out)
    assert (tmp_path / "model.pt").read_text() == "mine"


def test_fused_attention_is_refused(tiny_unet):
    unet = tiny_unet()
    expected = to_openai_state_dict(unet)
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        to_openai_state_dict(unet)
    unet.unfuse_qkv_projections()
    assert_same_bits(to_openai_state_dict(unet), expected)
    assert {name: tuple(tensor.shape) for name, tensor in expected.items()} == published_shapes(unet)


def test_half_precision_goes_out_in_float32(checkpoint, reference, convert, tmp_path):
    stored = reference("classifier_spatial")
    rest = ["--flags", needed_flags(stored.config), "--dtype", "bf16", "--output", tmp_path / "out"]
    convert("--checkpoint", checkpoint("classifier_spatial"), *rest)
    convert(tmp_path / "out", "--to", "openai", "--output", tmp_path / "back.pt")
    rounded = {name: tensor.bfloat16().float() for name, tensor in stored.weights.items()}
    assert_same_bits(torch.load(tmp_path / "back.pt", weights_only=True), rounded)


def test_to_the_hub_and_back_from_it(checkpoint, reference, refused, tmp_path):
    stored = reference("classifier_attention")
    rest = ["--checkpoint", checkpoint("classifier_attention"), "--flags", needed_flags(stored.config)]
    rest += ["--output", tmp_path / "out", "--push_to_hub"]
    assert "needs --hub_model_id" in refused(*rest)
    there = [*rest, "--hub_model_id", "ada/noisy", "--hub_token", TOKEN]
    back = ["ada/noisy", "--to", "openai", "--output", tmp_path / "back.pt"]
    script = (
        "import json, sys; from hf_guided.cli import main; [main(['convert', *a]) for a in json.loads(sys.argv[1])]"
    )
    with HubServer({TOKEN: User("ada")}) as hub:
        arguments = json.dumps([list(map(str, there)), list(map(str, back))])
        command = [sys.executable, "-c", script, arguments]
        environment = hub.environment(tmp_path / "home")
        done = forked.run(command, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        assert f"{hub.endpoint}/ada/noisy" in done.stdout
        assert 'model="ada/noisy"' in hub.repos["ada/noisy"].head().files["README.md"].decode()
        assert_same_bits(torch.load(tmp_path / "back.pt", weights_only=True), stored.weights)

        rest[rest.index(tmp_path / "out")] = tmp_path / "second"
        nobody = [*map(str, rest), "--hub_model_id", "ada/noisy", "--hub_token", TOKEN + "x"]
        command[-1] = json.dumps([nobody])
        done = forked.run(command, env=environment, timeout=120)
        assert done.returncode == 1
        assert "error: The Hub does not accept this token" in done.stderr
        assert not (tmp_path / "second").exists()
    assert ADMForImageClassification.from_pretrained(tmp_path / "out").config.num_labels == 5


def test_what_the_hub_does_not_have_is_said_in_a_sentence(refused, tmp_path, monkeypatch):
    back = ["ada/none", "--to", "openai", "--output", str(tmp_path / "back.pt")]
    with HubServer({TOKEN: User("ada")}) as hub:
        command = [sys.executable, "-m", "hf_guided.cli", "convert", *back, "--hub_token", TOKEN]
        environment = hub.environment(tmp_path / "home")
        done = forked.run(command, env=environment, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch("error: There is no folder ada/none, and ada/none was not found on the Hub .*\n", done.stderr)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    assert "could not be downloaded from the Hub" in refused(*back)
    assert not list(tmp_path.glob("*.pt"))


def test_a_foreign_unet_is_refused(refused, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    small = UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )  # fmt: skip
    DDPMPipeline(small, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    sentence = refused(tmp_path / "ddpm", "--to", "openai", "--output", tmp_path / "model.pt")
    assert "is a UNet2DModel" in sentence
    assert not isinstance(small, ADMUNet2DModel)
