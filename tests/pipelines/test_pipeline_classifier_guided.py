"""The pipeline against published trajectories, its promises to users, and its life as files."""

import json
import subprocess
import sys

import diffusers
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from hf_guided import ADMScheduler, ADMUNet2DModel, ClassifierGuidedPipeline
from hf_guided.conversion import convert_openai_classifier
from hf_guided.guidance import ClassifierGuidance
from hf_guided.models.classifier_adm import ADMClassifierConfig, ADMForImageClassification

SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "daisy", 3: "crane", 4: "pug, pug-dog"}


def make_unet(channels=1, num_class_embeds=5, null_class_label=True, **kwargs):
    torch.manual_seed(0)
    unet = ADMUNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=2 * channels,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_heads=2,
        num_class_embeds=num_class_embeds,
        null_class_label=null_class_label,
        **kwargs,
    )
    for parameter in unet.parameters():  # zero-initialised layers would hide what reaches them
        parameter.data += 0.02 * torch.randn_like(parameter)
    return unet.eval()


def make_classifier(channels=1, **kwargs):
    torch.manual_seed(1)
    config = {"beta_schedule": "squaredcos_cap_v2", "id2label": NAMES, "label2id": {}, "pool": "attention", **kwargs}
    classifier = ADMForImageClassification(
        ADMClassifierConfig(
            sample_size=8,
            in_channels=channels,
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(4,),
            num_heads=2,
            **config,
        )
    )
    for parameter in classifier.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return classifier.eval()


def make_pipeline(scheduler=None, channels=1, **kwargs):
    components = {
        "unet": make_unet(channels),
        "scheduler": scheduler or ADMScheduler(beta_schedule="squaredcos_cap_v2"),
        "classifier": make_classifier(channels),
        "sampling_defaults": {"respacing": "5"},
        **kwargs,
    }
    pipe = ClassifierGuidedPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipe, labels, **kwargs):
    return pipe(labels, **{"generator": seeded(), "output_type": "latent", **kwargs}).images


class CallCounter:
    """Counts the forward passes of a real module."""

    def __init__(self, module):
        self.calls = 0
        self.handle = module.register_forward_hook(self.count)

    def count(self, *args):
        self.calls += 1

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.handle.remove()


@pytest.mark.parametrize(
    "name",
    [
        "ddim_linear_ddim10",
        "ddim_linear_eta08",
        "ddpm_cosine_10",
        "ddpm_linear_sections",
        "ddpm_unguided",
    ],
)
def test_samples_like_the_published_code(name, reference, sampler_unet):
    config, tensors = reference(f"trajectory_{name}").config, reference(f"trajectory_{name}").tensors
    stored = reference("sampler_classifier")
    classifier = convert_openai_classifier(
        stored.weights, {**stored.config, "beta_schedule": SCHEDULE[config["beta_schedule"]]}
    )
    scheduler = ADMScheduler(beta_schedule=SCHEDULE[config["beta_schedule"]], algorithm_type=config["sampler"])
    pipe = ClassifierGuidedPipeline(sampler_unet, scheduler, classifier)
    pipe.set_progress_bar_config(disable=True)
    steps = []

    def watch(pipe, i, t, tensors):
        steps.append((int(t), tensors["latents"]))
        return {}

    images = pipe(
        tensors["y"],
        respacing=config["respacing"],
        guidance_scale=config["classifier_scale"],
        eta=config["eta"],
        latents=tensors["initial_noise"],
        variance_noise=tensors["step_noise"],
        output_type="latent",
        callback_on_step_end=watch,
    ).images
    assert [t for t, _ in steps] == tensors["timesteps"].tolist()
    for (_, latents), expected in zip(steps, tensors["samples"], strict=True):
        assert (latents - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(images, steps[-1][1])


def test_saved_pipeline_gives_the_same_images_in_another_process(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    for component, name in {
        "unet": "ADMUNet2DModel",
        "scheduler": "ADMScheduler",
        "classifier": "ADMForImageClassification",
    }.items():
        assert index[component] == ["hf_guided", name]
    assert not any(isinstance(value, list) and len(value) != 2 for value in index.values())
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path / "pipeline")
    expected = sample(loaded, ["daisy", 4])
    # Weights in a mapped file are aligned otherwise than in memory, for which some processors round otherwise.
    torch.testing.assert_close(expected, sample(pipe, ["daisy", 4]), atol=1e-5, rtol=0)
    torch.save(expected, tmp_path / "expected.pt")
    script = f"""
import torch
from hf_guided import ClassifierGuidedPipeline
pipe = ClassifierGuidedPipeline.from_pretrained({str(tmp_path / "pipeline")!r})
images = pipe(["daisy", 4], generator=torch.Generator().manual_seed(0), output_type="latent").images
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
assert torch.equal(images, expected), (images - expected).abs().max()
assert pipe.config.sampling_defaults == {{"respacing": "5"}}
assert type(pipe.unet).__module__ == "hf_guided.models.unet_adm"
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_optional_parts_come_back_as_none(tmp_path):
    make_pipeline(classifier=None, id2label={0: "a", 1: "b"}).save_pretrained(tmp_path)
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    assert pipe.classifier is None
    assert pipe.guide_unet is None
    assert pipe.id2label == {0: "a", 1: "b"}
    assert pipe.id_of_name("b") == 1


def test_labels_by_id_name_synonym_list_and_tensor(pipe):
    expected = sample(pipe, [2, 0])
    for labels in (["daisy", "tench"], ["DAISY", "tinca tinca"], ["daisy", 0], torch.tensor([2, 0])):
        assert torch.equal(sample(pipe, labels), expected)
    assert torch.equal(pipe.resolve_labels("pug"), torch.tensor([4]))
    assert pipe.resolve_labels([1, 2]).tolist() == [1, 2]
    thrice = sample(pipe, [1, 2], num_images_per_label=3)
    assert torch.equal(thrice, sample(pipe, [1, 1, 1, 2, 2, 2]))


def test_unknown_labels_are_explained(pipe):
    with pytest.raises(ValueError, match=r"no class named 'dasy'; the nearest are 'daisy'"):
        pipe("dasy")
    with pytest.raises(ValueError, match=r"'crane' belongs to several ids: 1 \(crane\), 3 \(crane\)"):
        pipe("crane")
    with pytest.raises(ValueError, match=r"\[5, -1\] are not among the ids of the 5 classes"):
        pipe([0, 5, -1])


def test_an_image_does_not_depend_on_its_batch(pipe):
    together = sample(pipe, [2, 0, 4])
    generator = seeded()
    for i, label in enumerate([2, 0, 4]):
        alone = sample(pipe, [label], generator=generator)
        assert (alone - together[i : i + 1]).abs().max() < 1e-4
    listed = sample(pipe, [2, 0, 4], generator=[seeded(5), seeded(6), seeded(7)])
    for i, label in enumerate([2, 0, 4]):
        alone = [sample(pipe, label, generator=given) for given in (seeded(5 + i), [seeded(5 + i)])]
        assert torch.equal(*alone)
        assert (alone[0] - listed[i : i + 1]).abs().max() < 1e-4
    # the same generator continues where the first batch left it
    generator = seeded()
    batches = [sample(pipe, labels, generator=generator) for labels in ([2], [0, 4])]
    assert (torch.cat(batches) - together).abs().max() < 1e-4
    assert not torch.equal(together[0], together[1])


def test_scale_zero_is_exactly_no_guidance(pipe):
    with CallCounter(pipe.classifier) as classifier:
        unguided = sample(pipe, [2], guidance_scale=0)
        assert classifier.calls == 0
        guided = sample(pipe, [2], guidance_scale=50)
        assert classifier.calls == 5
    without = make_pipeline(classifier=None)
    assert torch.equal(unguided, sample(without, [2]))
    assert not torch.equal(unguided, guided)


def test_guidance_raises_the_classifiers_probability(pipe):
    labels = torch.arange(5).repeat(4)

    def probability(scale):
        images = sample(pipe, labels, guidance_scale=scale, condition_unet=False)
        with torch.no_grad():
            return pipe.classifier(images).logits.softmax(-1)[range(20), labels].mean()

    assert probability(300.0) > probability(100.0) > probability(0.0) + 0.004


def test_guidances_add_up_and_mind_their_interval(pipe):
    twice = sample(pipe, [2], guidance=ClassifierGuidance(6.0))
    added = sample(pipe, [2], guidance=[ClassifierGuidance(2.0), ClassifierGuidance(4.0)])
    assert (added - twice).abs().max() < 1e-5
    assert torch.equal(twice, sample(pipe, [2], guidance_scale=6.0))
    with CallCounter(pipe.classifier) as classifier:
        sample(pipe, [2], guidance=ClassifierGuidance(6.0, interval=(200, 800)))
        assert classifier.calls == 3  # timesteps 999, 749, 500, 250, 0 without both ends
    with pytest.raises(ValueError, match="not both"):
        pipe(2, guidance_scale=1.0, guidance=ClassifierGuidance(1.0))
    with pytest.raises(ValueError, match="finite number from 0 up"):
        pipe(2, guidance_scale=-1.0)
    with pytest.raises(ValueError, match=r"interval=\(5, 1\)"):
        ClassifierGuidance(1.0, interval=(5, 1))


def test_the_gradient_is_float32_and_leaves_the_classifier_alone():
    pipe = make_pipeline(classifier=make_classifier().to(torch.bfloat16))
    frozen = next(pipe.classifier.parameters())
    frozen.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in pipe.classifier.named_parameters()}
    seen = []

    def watch(pipe, i, t, tensors):
        seen.append(tensors["gradient"].dtype)
        return {}

    pipe([1, 2], callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["gradient"])
    assert seen == [torch.float32] * 5
    assert {name: parameter.requires_grad for name, parameter in pipe.classifier.named_parameters()} == before
    assert all(parameter.grad is None for parameter in pipe.classifier.parameters())


def test_condition_unet_false_is_the_null_label(pipe):
    unconditional = sample(pipe, [2], guidance_scale=0, condition_unet=False)
    assert torch.equal(unconditional, sample(pipe, None, guidance_scale=0))
    assert not torch.equal(unconditional, sample(pipe, [2], guidance_scale=0))
    assert sample(pipe, None, num_images_per_label=3).shape == (3, 1, 8, 8)
    no_null = make_pipeline(unet=make_unet(null_class_label=False))
    with pytest.raises(ValueError, match="null label"):
        no_null(2, condition_unet=False)
    with pytest.raises(ValueError, match="class_labels must be given"):
        no_null()


def test_unconditional_unet_steered_by_the_classifier():
    pipe = make_pipeline(unet=make_unet(num_class_embeds=None, null_class_label=False))
    assert not torch.equal(sample(pipe, ["daisy"], guidance_scale=30), sample(pipe, None))
    alone = make_pipeline(unet=pipe.unet, classifier=None)
    assert torch.equal(sample(alone, None), sample(pipe, None))
    with pytest.raises(ValueError, match="no classes"):
        alone(2)


def test_guidance_that_cannot_work_is_refused_before_the_first_step(pipe):
    refused = [
        (make_pipeline(classifier=None), {"class_labels": 1, "guidance_scale": 2.0}, "needs a classifier"),
        (pipe, {"guidance_scale": 2.0}, "needs class_labels"),
        (
            make_pipeline(classifier=make_classifier(beta_schedule="linear")),
            {"class_labels": 1},
            "another noise schedule",
        ),
        (
            make_pipeline(classifier=make_classifier(num_train_timesteps=500)),
            {"class_labels": 1},
            "another noise schedule",
        ),
        (make_pipeline(classifier=make_classifier(channels=3)), {"class_labels": 1}, "3 channels and the UNet of 1"),
        (
            make_pipeline(
                ADMScheduler(num_train_timesteps=500, beta_schedule="squaredcos_cap_v2"),
                classifier=make_classifier(num_train_timesteps=500, rescale_timesteps=True),
            ),
            {"class_labels": 1},
            "rescale_timesteps=True",
        ),
        (
            make_pipeline(classifier=make_classifier(id2label={0: "a", 1: "b"})),
            {"class_labels": 1},
            "2 classes and the UNet 5",
        ),
    ]
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=5)
    refused.append((make_pipeline(classifier=ResNetForImageClassification(config)), {"class_labels": 1}, "no timestep"))
    for pipeline, arguments, message in refused:
        with CallCounter(pipeline.unet) as unet:
            with pytest.raises(ValueError, match=message):
                pipeline(**arguments)
            assert unet.calls == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"respacing": "5", "num_inference_steps": 5}, "only one of"),
        ({"respacing": "2000"}, "asks for 2000 timesteps"),
        ({"timesteps": [1, 2]}, "descending"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"eta": 0.5}, "belongs to 'ddim'"),
        ({"latents": torch.zeros(2, 1, 8, 8)}, "latents have shape"),
        ({"variance_noise": torch.zeros(4, 1, 1, 8, 8)}, "variance_noise is a Tensor of shape"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "one per image"),
        ({"num_images_per_label": 0}, "num_images_per_label=0 is not allowed"),
        ({"callback_on_step_end_tensor_inputs": ["labels"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_bad_arguments_get_one_sentence(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(2, **arguments)


def test_output_types(pipe):
    latent = sample(pipe, [2, 0])
    assert latent.shape == (2, 1, 8, 8)
    as_pt = sample(pipe, [2, 0], output_type="pt")
    assert torch.allclose(as_pt, (latent / 2 + 0.5).clamp(0, 1))
    as_np = sample(pipe, [2, 0], output_type="np")
    assert as_np.shape == (2, 8, 8, 1)
    assert abs(as_np[..., 0] - as_pt[:, 0].numpy()).max() == 0
    picture = pipe([2, 0], generator=seeded()).images[1]
    assert (picture.mode, picture.size) == ("L", (8, 8))
    assert make_pipeline(channels=3)([2], generator=seeded()).images[0].mode == "RGB"
    assert pipe([2], return_dict=False, output_type="latent")[0].shape == (1, 1, 8, 8)
    five = make_pipeline(channels=5)
    assert sample(five, [2], output_type="np").shape == (1, 8, 8, 5)
    with pytest.raises(ValueError, match="5 channels cannot be PIL"):
        five(2)


def test_timesteps_and_saved_defaults(pipe):
    steps = []

    def watch(pipe, i, t, tensors):
        steps.append(int(t))
        return tensors

    for arguments in ({}, {"respacing": "5"}, {"num_inference_steps": 5}, {"timesteps": [999, 749, 500, 250, 0]}):
        steps.clear()
        pipe(2, callback_on_step_end=watch, **arguments)
        assert steps == [999, 749, 500, 250, 0]
    with_defaults = make_pipeline(sampling_defaults={"respacing": "ddim5", "guidance_scale": 7.0})
    assert torch.equal(sample(with_defaults, [2]), sample(pipe, [2], respacing="ddim5", guidance_scale=7.0))
    assert torch.equal(sample(pipe, [2]), sample(pipe, [2], guidance_scale=1.0))


def test_callback_sees_and_replaces_tensors(pipe):
    seen = {}

    def at_last(pipe, i, t, tensors):
        seen.update({name: tensor.shape for name, tensor in tensors.items()})
        return {"latents": torch.full_like(tensors["latents"], 0.25)} if i == 4 else {}

    names = ["latents", "model_output", "gradient"]
    images = sample(pipe, [2], callback_on_step_end=at_last, callback_on_step_end_tensor_inputs=names)
    assert seen == {"latents": (1, 1, 8, 8), "model_output": (1, 2, 8, 8), "gradient": (1, 1, 8, 8)}
    assert (images == 0.25).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
    ],
)
def test_schedulers_of_diffusers(name, channels):
    adm = ADMScheduler(beta_schedule="squaredcos_cap_v2")
    pipe = make_pipeline(getattr(diffusers, name).from_config(adm.config), channels)
    assert sample(pipe, ["daisy"]).shape == (1, channels, 8, 8)  # with the saved default, a respacing
    images = sample(pipe, ["daisy", 0], num_inference_steps=8, guidance_scale=5.0)
    assert images.shape == (2, channels, 8, 8)
    assert images.abs().max() < 1.1  # cosine: unclipped, the first steps would explode to thousands
    unguided = sample(pipe, ["daisy", 0], num_inference_steps=8, guidance_scale=0.0)
    assert not torch.equal(images, unguided)


def test_ddim_of_diffusers_agrees_with_ours():
    adm = ADMScheduler(beta_schedule="squaredcos_cap_v2", algorithm_type="ddim")
    theirs = diffusers.DDIMScheduler.from_config(adm.config, timestep_spacing="leading")
    ours = sample(make_pipeline(adm), [2, 0], respacing="ddim10", guidance_scale=0)
    other = sample(make_pipeline(theirs, sampling_defaults=None), [2, 0], num_inference_steps=10, guidance_scale=0)
    assert (ours - other).abs().max() < 1e-4


def test_respacing_strings_reach_schedulers_of_diffusers_that_take_timesteps():
    adm = ADMScheduler(beta_schedule="squaredcos_cap_v2")
    pipe = make_pipeline(diffusers.DDPMScheduler.from_config(adm.config))
    sample(pipe, [2], respacing="3,2")
    assert pipe.scheduler.timesteps.tolist() == [999, 500, 499, 250, 0]
    pipe = make_pipeline(diffusers.DDIMScheduler.from_config(adm.config))
    with pytest.raises(ValueError, match="chooses its own timesteps"):
        pipe([2], respacing="3,2")


def test_unet_of_diffusers():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        num_class_embeds=5,
    )
    scheduler = ADMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_small")
    pipe = make_pipeline(scheduler, unet=unet)
    assert not torch.equal(sample(pipe, [2], guidance_scale=20), sample(pipe, [2], guidance_scale=0))


def test_rescaled_timesteps_reach_unet_and_classifier():
    timesteps = []
    scheduler = ADMScheduler(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2", rescale_timesteps=True)
    classifier = make_classifier(num_train_timesteps=4000, rescale_timesteps=True)
    for pipe in (
        make_pipeline(scheduler, classifier=classifier),
        make_pipeline(
            diffusers.DDPMScheduler.from_config(scheduler.config), classifier=classifier, sampling_defaults=None
        ),
    ):
        timesteps.clear()
        hooks = [
            pipe.unet.register_forward_pre_hook(lambda module, args: timesteps.append(float(args[1]))),
            pipe.classifier.register_forward_pre_hook(lambda module, args: timesteps.append(float(args[1]))),
        ]
        pipe(2, respacing="2")
        for hook in hooks:
            hook.remove()
        assert timesteps == [999.75, 999.75, 0.0, 0.0]


def test_half_precision_keeps_the_sample_in_float32(pipe):
    half = make_pipeline().to(torch.bfloat16)
    images = sample(half, [2], guidance_scale=5.0)
    assert images.dtype == torch.float32
    assert (images - sample(pipe, [2], guidance_scale=5.0)).abs().mean() < 0.1


def test_non_square_images():
    unet = make_unet()
    wide = ADMUNet2DModel.from_config(unet.config, sample_size=(8, 16))
    wide.load_state_dict(unet.state_dict())
    pipe = make_pipeline(unet=wide, classifier=make_classifier(pool="adaptive"))
    assert pipe(2, generator=seeded()).images[0].size == (16, 8)


def test_components_make_another_pipeline(pipe):
    optional = {"classifier", "classifier_processor", "guide_unet", "clean_classifier", "clip_model", "clip_processor"}
    assert set(pipe.components) == {"unet", "scheduler", *optional}
    other = ClassifierGuidedPipeline(**pipe.components, sampling_defaults={"respacing": "5"})
    other.set_progress_bar_config(disable=True)
    assert torch.equal(sample(other, [2]), sample(pipe, [2]))


def test_what_callbacks_of_diffusers_ask_for(pipe):
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append((pipeline.num_timesteps, pipeline.guidance_scale))

    plain = sample(pipe, 2)
    assert torch.equal(sample(pipe, 2, callback_on_step_end=look), plain)  # and None replaces nothing
    assert len(seen) == seen[0][0]
    assert len(set(seen)) == 1
    with pytest.raises(ValueError, match="callback_on_step_end returned a Tensor; return a dict"):
        sample(pipe, 2, callback_on_step_end=lambda *arguments: torch.zeros(1))
    with pytest.raises(ValueError, match="generator is a str; give"):
        sample(pipe, 2, generator="x")
    with pytest.raises(ValueError, match="latents is a ndarray; give a"):
        sample(pipe, 2, latents=torch.zeros(1, 3, 16, 16).numpy())
