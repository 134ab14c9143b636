"""Class-conditional images by classifier-guided diffusion (ADM, arXiv 2105.05233, section 4)."""

import inspect
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPModel, CLIPProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..guidance import ClassifierGuidance, Guidance, guidance_from_dict
from ..guidance.base import GradientGuidance
from ..guidance.guider import Guider
from ..guidance.monitor import SamplingCost, broken_images
from ..models.classifier_adm import ADMForImageClassification  # noqa: F401

# Imported to register these classes with diffusers, since a saved pipeline may name them.
from ..models.unet_adm import ADMUNet2DModel  # noqa: F401
from ..schedulers.diffusers_compat import check_solver, set_solver_timesteps, solver_step
from ..schedulers.repaint import RePaint, jump_positions
from ..schedulers.scheduling_adm import FEW_STEPS, ADMScheduler, model_timesteps  # noqa: F401
from ..settings import is_number
from .class_conditional import ClassConditionalPipeline, Labels
from .inputs import STEPS, Images, check_eta, check_latents, check_one_kind, check_steps, images_to_tensor, match_batch


@dataclass
class GuidedPipelineOutput(ImagePipelineOutput):
    """Output of the guided pipelines.

    Args:
        images (a list of PIL images, `np.ndarray` or `torch.Tensor`): In the type of `output_type`.
        cost ([`~hf_guided.guidance.monitor.SamplingCost`], *optional*): Model calls and seconds, with `return_cost`.
    """

    cost: SamplingCost | None = None


class ClassifierGuidedPipeline(ClassConditionalPipeline):
    r"""Samples images of given classes with a diffusion model, guided by a noisy-image classifier or in other ways.

    Args:
        unet ([`ADMUNet2DModel`] or [`~diffusers.UNet2DModel`]): Predicts the noise, class-conditional or not.
        scheduler ([`ADMScheduler`], or one of diffusers): Denoises step by step.
        classifier ([`ADMForImageClassification`] or any image classifier of transformers, *optional*): Guides.
            Without it sampling is not classifier-guided.
        classifier_processor (`BaseImageProcessor`, *optional*): The preprocessing of
            [`DenoisedClassifierGuidance`], for a classifier whose input is not in [-1, 1].
        guide_unet ([`ADMUNet2DModel`], *optional*): The second, weaker UNet of [`AutoGuidance`].
        id2label (`dict[int, str]`, *optional*): Class names. Default: the classifier's.
        sampling_defaults (`dict`, *optional*): Defaults of the call for `num_inference_steps`, `respacing`,
            `timesteps`, `guidance_scale`, `guidance` and `eta`.
        clean_classifier (`PreTrainedModel`, *optional*): The classifier of [`DenoisedClassifierGuidance`], if it is not
            `classifier`.
        clip_model (`CLIPModel`, *optional*), clip_processor (`CLIPProcessor`, *optional*): For [`CLIPGuidance`].

    Raises:
        `ValueError`: For defaults that cannot be saved.
    """

    main_component = "unet"
    model_cpu_offload_seq = "clip_model->clean_classifier->classifier->guide_unet->unet"
    _optional_components = [
        "classifier",
        "classifier_processor",
        "guide_unet",
        "clean_classifier",
        "clip_model",
        "clip_processor",
    ]
    _callback_tensor_inputs = ["latents", "model_output", "gradient"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        classifier: PreTrainedModel | None = None,
        classifier_processor: BaseImageProcessor | None = None,
        guide_unet: ModelMixin | None = None,
        id2label: dict | None = None,
        sampling_defaults: dict | None = None,
        clean_classifier: PreTrainedModel | None = None,
        clip_model: CLIPModel | None = None,
        clip_processor: CLIPProcessor | None = None,
    ):
        super().__init__(
            id2label,
            unet=unet,
            scheduler=scheduler,
            classifier=classifier,
            classifier_processor=classifier_processor,
            guide_unet=guide_unet,
            clean_classifier=clean_classifier,
            clip_model=clip_model,
            clip_processor=clip_processor,
        )
        if not isinstance(sampling_defaults, Mapping | None):
            raise ValueError(f"sampling_defaults={sampling_defaults!r} is not a mapping from names to values.")
        self.set_sampling_defaults(**(sampling_defaults or {}))

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by id; empty if there are no classes."""
        names, classifier = self.config.id2label, self.classifier
        if classifier is None and self.unet.config.num_class_embeds is None:
            classifier = self.clean_classifier  # the only classes there are
        if names is None and classifier is not None:
            names = classifier.config.id2label
        return {int(label): name for label, name in (names or {}).items()}

    @property
    def num_classes(self) -> int | None:
        """The number of classes, or `None` for an unconditional model without a classifier."""
        if self.unet.config.num_class_embeds is not None:
            return self.unet.config.num_class_embeds
        return len(self.id2label) if self.classifier or self.clean_classifier else None

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.unet.config.in_channels

    @property
    def has_adm_scheduler(self) -> bool:
        """Whether the scheduler is an [`ADMScheduler`], this package's or one of a repository with its own code."""
        return getattr(self.scheduler, "takes_gradient", False)

    @property
    def num_timesteps(self) -> int:
        """Steps of the current or last call."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> Any:
        """Scale of classifier guidance in the current or last call; `None` without it."""
        return self._guidance_scale

    def set_sampling_defaults(self, **defaults: Any) -> None:
        """Replaces the saved defaults of the call.

        Args:
            num_inference_steps, respacing, timesteps, guidance_scale, guidance, eta: As in the call. Those left out
                have no saved default any more.

        Raises:
            `ValueError`: For another name, and for a guidance that holds a function.
        """
        unknown = set(defaults) - {*STEPS, "guidance_scale", "guidance", "eta"}
        if unknown:
            raise ValueError(f"sampling_defaults does not support {', '.join(sorted(unknown))}.")
        check_one_kind(defaults.get("guidance"), defaults.get("guidance_scale"))
        check_steps(sys.maxsize, **{name: defaults.get(name) for name in STEPS})  # the scheduler may be exchanged later
        if defaults.get("guidance_scale") is not None:
            ClassifierGuidance(defaults["guidance_scale"])
        check_eta(defaults.get("eta"))
        if (kinds := defaults.get("guidance")) is not None:
            kinds = kinds if isinstance(kinds, list | tuple) else [kinds]
            kinds = [kind if isinstance(kind, Guidance) else guidance_from_dict(kind) for kind in kinds]
            defaults = {**defaults, "guidance": [kind.to_dict() for kind in kinds]}
        self.register_to_config(sampling_defaults=defaults or None)

    def compile(self, **options: Any) -> None:
        """Compiles the UNets and the classifier in place, block by block. The next step then takes a minute or more.

        Compiled code is cached on disk (`TORCHINDUCTOR_CACHE_DIR`) for other processes. Another batch size compiles
        again, unless it runs under `torch.compiler.set_stance("force_eager")`.

        Args:
            options: For `torch.compile`. Default: `dynamic=False`, and on the CPU, unless a backend, mode or options
                are given, `options={"layout_optimization": False}`: in the layout that the compiler would choose there,
                norms lose more time than convolutions gain, and sums over channels are rounded more.

        Raises:
            `ValueError`: If there is no C++ compiler, which the CPU needs.
        """
        options = {"dynamic": False, **options}
        if self._execution_device.type == "cpu":
            if not any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++"])):
                raise ValueError("Compiling for the CPU needs a C++ compiler: install g++ or clang++.")
            if options.keys().isdisjoint(("backend", "mode", "options")):
                options["options"] = {"layout_optimization": False}
        for model in (self.unet, self.guide_unet, self.classifier):
            if model is None:
                continue
            regions = getattr(model, "_repeated_blocks", None) or [type(model).__name__]
            for module in model.modules():
                if type(module).__name__ in regions:
                    module.compile(**options)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int | None = None,
        *,
        respacing: str | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance: Guidance | Sequence[Guidance] | None = None,
        condition_unet: bool = True,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        variance_noise: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        image: Images | None = None,
        strength: float | None = None,
        mask_image: Images | None = None,
        jump_length: int | None = None,
        jump_n_sample: int = 10,
        gradient_batch_size: int | None = None,
        nonfinite_gradient: str = "raise",
        return_cost: bool = False,
    ) -> GuidedPipelineOutput | tuple:
        r"""Samples images: noise -> (UNet -> guidance -> scheduler step) x N -> image.

        Args:
            class_labels (`int`, `str`, a list, array or tensor of them, *optional*): Classes by id or by name from
                `id2label`; floats and booleans are refused. `None`: unconditional, without guidance by class.
            num_images_per_label (`int`, defaults to 1): Images of each label, consecutive in the batch; without labels,
                the batch size.
            num_inference_steps (`int`, *optional*): Number of steps. Give at most one of this, `respacing` and
                `timesteps`. Default: the saved one, or else the scheduler's.
            respacing (`str`, *optional*): OpenAI's notation: `"250"`, `"ddim25"`, `"90,60,60,20,20"`.
            timesteps (`Sequence[int]`, *optional*): The timesteps themselves, descending.
            guidance_scale (`float`, *optional*): Scale of classifier guidance; 0 is none. Default: the saved one, or
                else 1, if there are labels and a classifier.
            guidance (an object of `hf_guided.guidance` or a list, *optional*): Instead of `guidance_scale`, which is
                short for [`ClassifierGuidance`]. The kinds of a list compose, in any order.
            condition_unet (`bool`, defaults to `True`): Condition a class-conditional UNet on the labels. `False` gives
                it the null label, so that the classifier alone guides.
            eta (`float`, *optional*): DDIM's share of noise, 0 to 1. Default: the saved one, or else 0.
            generator (`torch.Generator` or a list, *optional*): A single one gives image i the i-th integer drawn from
                it as its own seed, so that images do not depend on the batch; in a list, each gives one.
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`, *optional*): The initial noise, of
                standard deviation 1.
            variance_noise (`torch.Tensor` of shape `(steps, batch, channels, height, width)`, *optional*): The noise
                of each step.
            output_type (`str`, defaults to `"pil"`): `"pil"`; `"np"` `(batch, height, width, channels)` in [0, 1];
                `"pt"` `(batch, channels, height, width)` in [0, 1]; `"latent"`, the same in [-1, 1], not clipped.
            return_dict (`bool`, defaults to `True`): Return an output object instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `(pipeline, step, timestep, tensors)` after each
                step; the `"latents"` of a returned dict replace them, `None` replaces nothing.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, defaults to `("latents",)`): Tensors passed to the
                callback, of `latents`, `model_output` and `gradient`.
            image (PIL image, array, tensor or a list of them, *optional*): The image to edit, of the UNet's size, see
                [`images_to_tensor`]; one for all labels, or one for each.
            strength (`float`, *optional*): Share of the denoising steps that are run, in (0, 1]: the image is noised to
                that timestep and denoised from there (SDEdit, arXiv 2108.01073). 1 starts from pure noise. Default:
                0.8, or 1 with a mask.
            mask_image (PIL image, array, tensor or a list of them, *optional*): White where `image` is inpainted, black
                where its pixels are kept exactly (RePaint, arXiv 2201.09865); one for all, or one for each.
            jump_length (`int`, *optional*), jump_n_sample (`int`, defaults to 10): RePaint's resampling: after every
                `jump_length` steps (default: a 25th of them, as in the paper) the sample is noised back by as many
                steps and denoised again, until this was done `jump_n_sample` times. `jump_n_sample=1` is no resampling:
                far fewer UNet calls, a less coherent result.
            gradient_batch_size (`int`, *optional*): Images per gradient computation, which bounds the memory of
                guidance. Default: all.
            nonfinite_gradient (`str`, defaults to `"raise"`): What to do with an infinite or NaN gradient of an image:
                `"raise"`, or `"skip"` it and count it in the cost.
            return_cost (`bool`, defaults to `False`): Also return the number and time of model calls.

        Returns:
            [`GuidedPipelineOutput`]: `.images`, and `.cost` with `return_cost`.

        Raises:
            `ValueError`: For unknown labels, guidance that these components do not support, contradicting arguments or
                tensors of the wrong shape.
            `RuntimeError`: If a gradient or the images are not finite.

        Examples:
            ```py
            >>> import torch
            >>> from hf_guided import ClassifierGuidedPipeline

            >>> pipe = ClassifierGuidedPipeline.from_pretrained("outputs/pipeline")
            >>> images = pipe(["3", "7"], guidance_scale=3.0, generator=torch.Generator().manual_seed(0)).images
            ```
        """
        # 1. Arguments
        original, mask, low_res = self.prepare_images(image, mask_image, strength, latents)
        batch_size, labels, original, mask, low_res = match_batch(
            num_images_per_label, self.resolve_labels(class_labels), original, mask, low_res
        )
        self.check_inputs(labels, condition_unet, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        kinds = self.resolve_guidance(guidance, guidance_scale, labels, condition_unet)
        eta = self.resolve_eta(eta)
        conditions = {} if low_res is None else {"low_res": low_res}
        if labels is not None and condition_unet and self.unet.config.num_class_embeds is not None:
            conditions["class_labels"] = labels

        # 2. Timesteps and noise
        self.set_timesteps(num_inference_steps, respacing, timesteps)
        generators = self.prepare_generators(generator, batch_size)
        latents = self.prepare_latents(latents, batch_size, generators)
        loop_timesteps, repaint = self.scheduler.timesteps, None
        if original is not None:
            if strength is None:
                strength = 0.8 if mask is None else 1.0
            loop_timesteps, latents = self.start_from(original, latents, strength)
        if mask is not None:
            jump_length = max(1, round(len(loop_timesteps) / 25)) if jump_length is None else jump_length
            loop_timesteps = loop_timesteps[jump_positions(len(loop_timesteps), jump_length, jump_n_sample)]
            repaint = RePaint(self.scheduler, original, mask)
        schedule = loop_timesteps.tolist()  # one transfer to the host, not one per step
        following = [*schedule[1:], None]
        self._num_timesteps = len(schedule)
        self._guidance_scale = next((kind.scale for kind in kinds if isinstance(kind, ClassifierGuidance)), None)
        shape = (len(schedule), *latents.shape)
        if variance_noise is not None and not (torch.is_tensor(variance_noise) and variance_noise.shape == shape):
            raise ValueError(
                f"variance_noise is a {type(variance_noise).__name__} of shape "
                f"{tuple(getattr(variance_noise, 'shape', ()))}; {len(schedule)} steps of this "
                f"batch need a torch.Tensor of shape {shape}."
            )
        kinds = self.acting_guidance(kinds, schedule, guidance is None and guidance_scale is None)
        guider = Guider(self, kinds, labels, gradient_batch_size, nonfinite_gradient, timed=return_cost)

        # 3. noise -> (UNet -> guidance -> scheduler step) x N -> image
        previous = None
        for i, t in enumerate(self.progress_bar(loop_timesteps)):
            model_input = self.scheduler.scale_model_input(latents, t)
            parts = []
            for rows in guider.begin_step(i, schedule[i], latents):
                with guider.differentiable(model_input[rows]) as x_t:
                    prediction = self.predict(x_t, t, rows, conditions, guider)
                guider.add_gradient(x_t, prediction, rows)
                parts.append(prediction.detach())
                del prediction  # frees its graph before the next part
            model_output = torch.cat(parts)
            guider.monitor.record(broken_images(model_output), "unet", schedule[i], i)
            gradient = guider.gradient()

            noise: dict[str, Any] = {"generator": generators}
            if variance_noise is not None:
                noise = {"variance_noise": variance_noise[i].to(latents)}
            if self.has_adm_scheduler:
                output = self.scheduler.step(
                    model_output, t, latents, gradient=gradient, eta=eta, previous=previous, **noise
                )
                previous = (t, output.pred_original_sample)
                latents = output.prev_sample
            else:
                latents = solver_step(
                    self.scheduler, model_output, t, schedule[i], latents, model_input, gradient, eta=eta, **noise
                )
            if repaint is not None:
                latents = repaint(latents, schedule[i], following[i], generators)
                previous = None  # the known pixels have changed

            if callback_on_step_end is not None:
                tensors = {"latents": latents, "model_output": model_output, "gradient": gradient}
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, i, t, tensors)
                if not isinstance(returned, dict | None):
                    raise ValueError(
                        f"callback_on_step_end returned a {type(returned).__name__}; return a dict such as "
                        f'{{"latents": latents}}, or None.'
                    )
                replaced = (returned or {}).pop("latents", latents)
                previous = previous if replaced is latents else None
                latents = replaced
        guider.monitor.check()

        # 4. Images
        (images,) = self.finish(latents, output_type, return_dict=False)
        cost = guider.monitor.cost if return_cost else None
        if return_dict:
            return GuidedPipelineOutput(images=images, cost=cost)
        return (images, cost) if return_cost else (images,)

    def predict(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        rows: torch.Tensor,
        conditions: dict[str, torch.Tensor],
        guider: Guider,
    ) -> torch.Tensor:
        """The UNet's output, its prediction extrapolated from weaker ones (classifier-free guidance, autoguidance)."""
        timestep = model_timesteps(self.scheduler, timestep)
        conditions = {name: condition[rows] for name, condition in conditions.items()}
        components = {kind.component for kind in guider.acting_predictions}
        others = {}
        if "guide_unet" in components:
            known = dict(conditions)
            if self.guide_unet.config.num_class_embeds is None:
                known.pop("class_labels", None)
            with guider.monitor.measured("guide_unet"):
                output = self.guide_unet(sample.to(self.guide_unet.dtype), timestep, **known).sample
            others["guide_unet"] = output.float()
        unet_input = sample
        if "unet" in components:  # conditional and unconditional, in one doubled batch
            null_label = torch.full_like(rows, self.unet.config.num_class_embeds)
            unconditional = {**conditions, "class_labels": null_label}
            conditions = {name: torch.cat([known, unconditional[name]]) for name, known in conditions.items()}
            unet_input = torch.cat([sample, sample])
        with guider.monitor.measured("unet"):
            output = self.unet(unet_input.to(self.unet.dtype), timestep, **conditions).sample.float()
        if "unet" in components:
            output, others["unet"] = output.chunk(2)
        if not components:
            return output
        prediction, variance = output.tensor_split([sample.shape[1]], dim=1)
        differences = [
            kind.difference(prediction, others[kind.component][:, : sample.shape[1]], guider.timestep)
            for kind in guider.acting_predictions
        ]
        return torch.cat([sum(differences, start=prediction), variance], dim=1)

    def acting_guidance(self, kinds: list[Guidance], schedule: list[float], is_default: bool) -> list[Guidance]:
        """The kinds that act at some of the timesteps of a call; all must, unless they are the saved default."""
        acting = [kind for kind in kinds if sum(kind.acts_at(t) for t in schedule)]  # checks the scale at all of them
        for kind in kinds:
            if not is_default and kind not in acting:
                raise ValueError(
                    f"{kind!r} acts at none of the {len(schedule)} timesteps of this call, from {schedule[0]:g} to "
                    f"{schedule[-1]:g}; give another interval, more steps, or a higher strength."
                )
        return acting

    def prepare_images(
        self, image: Images | None, mask_image: Images | None, strength: float | None, latents: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The images to edit in [-1, 1], the mask of pixels to inpaint, and the small images of an upsampler."""
        if self.unet.config.get("low_res_channels") is not None:
            raise ValueError("This UNet is an upsampler: take ClassifierGuidedUpscalePipeline, or hf-guided upscale.")
        if image is None:
            if strength is not None or mask_image is not None:
                raise ValueError("strength and mask_image need an image: give image= too.")
            return None, None, None
        if not hasattr(self.scheduler, "add_noise"):
            raise ValueError(f"{type(self.scheduler).__name__} cannot start from an image; take another scheduler.")
        original = images_to_tensor(image, self.unet.config.in_channels).to(self._execution_device)
        height, width = self.sample_size if latents is None else latents.shape[-2:]
        if original.shape[-2:] != (height, width):
            raise ValueError(
                f"The image has {original.shape[-2]}x{original.shape[-1]} pixels and this UNet makes {height}x{width}; "
                f"resize or crop it first."
            )
        if mask_image is None:
            return original, None, None
        if not self.has_adm_scheduler:
            raise ValueError(f"mask_image needs an ADMScheduler; {type(self.scheduler).__name__} cannot jump back.")
        try:
            mask = images_to_tensor(mask_image, 1).to(self._execution_device) > 0
        except ValueError as error:
            raise ValueError(f"mask_image: {error}") from error
        if mask.shape[-2:] != original.shape[-2:]:
            raise ValueError(
                f"The mask has {mask.shape[-2]}x{mask.shape[-1]} pixels and the image {height}x{width}; resize it."
            )
        return original, mask, None

    def start_from(
        self, original: torch.Tensor, noise: torch.Tensor, strength: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The remaining timesteps at a strength, and the images noised to the first of them."""
        timesteps, order = self.scheduler.timesteps, self.scheduler.order
        steps = -(-len(timesteps) // order)
        if not (is_number(strength) and 0 < strength <= 1):
            raise ValueError(f"strength={strength!r} is not allowed; give a share of the steps, above 0 and up to 1.")
        if int(steps * strength) == 0:
            raise ValueError(f"strength={strength} leaves none of {steps} steps; give a higher strength or more steps.")
        if strength == 1:
            return timesteps, noise
        if isinstance(self.scheduler, LMSDiscreteScheduler | PNDMScheduler):
            raise ValueError(
                f"{type(self.scheduler).__name__} needs all steps from the first and cannot start at "
                f"strength={strength}; take another scheduler, or strength=1."
            )
        skipped = (steps - int(steps * strength)) * order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(skipped)
        first = timesteps[skipped].repeat(len(original))
        noise = noise / self.scheduler.init_noise_sigma  # add_noise scales it itself
        return timesteps[skipped:], self.scheduler.add_noise(original, noise, first)

    def default(self, name: str, otherwise: Any) -> Any:
        """The saved default of an argument, or `otherwise`."""
        saved = (self.config.sampling_defaults or {}).get(name)
        return otherwise if saved is None else saved

    def resolve_guidance(
        self,
        guidance: Guidance | Sequence[Guidance] | None,
        guidance_scale: float | None,
        labels: torch.Tensor | None,
        condition_unet: bool,
    ) -> list[Guidance]:
        """The kinds of guidance, without those of a neutral scale; checked against the components and labels."""
        check_one_kind(guidance, guidance_scale)
        if guidance_scale is not None:
            guidance = ClassifierGuidance(guidance_scale)
        elif guidance is None and (saved := self.default("guidance", None)) is not None:
            defaults = [guidance_from_dict(kind) for kind in saved]
            guidance = [kind for kind in defaults if labels is not None or not kind.needs_labels]
        elif guidance is None:
            possible = labels is not None and self.classifier is not None
            guidance = ClassifierGuidance(self.default("guidance_scale", 1.0) if possible else 0.0)
        kinds: list[Any] = list(guidance) if isinstance(guidance, list | tuple) else [guidance]
        for kind in kinds:
            if not isinstance(kind, Guidance):
                raise ValueError(f"guidance takes objects of hf_guided.guidance, one or a list; got {kind!r}.")
        kinds = [kind for kind in kinds if not kind.is_neutral]
        self.check_guidance(kinds, labels, condition_unet)
        return kinds

    def check_guidance(self, kinds: list[Guidance], labels: torch.Tensor | None, condition_unet: bool) -> None:
        """Raises `ValueError` for kinds that cannot work with the components, the scheduler and the labels."""
        takes_gradient = any(isinstance(kind, GradientGuidance) for kind in kinds)
        if takes_gradient and torch.is_inference_mode_enabled():
            raise ValueError("Gradients cannot be taken under torch.inference_mode(); call the pipeline without it.")
        if not self.has_adm_scheduler:
            check_solver(self.scheduler, shifted=takes_gradient)
        for kind in kinds:
            kind.check(self, labels, condition_unet)

    def resolve_eta(self, eta: float | None) -> float:
        """DDIM's share of noise: as given, or the saved default."""
        check_eta(eta)
        if eta and "eta" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(f"{type(self.scheduler).__name__} does not support eta; leave it out, or take DDIM.")
        return self.default("eta", 0.0) if eta is None else eta

    def check_inputs(
        self,
        labels: torch.Tensor | None,
        condition_unet: bool,
        output_type: str,
        callback_on_step_end: Callable[..., dict[str, Any]] | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raises `ValueError`, before the first step, for arguments that would fail or mislead later."""
        config = self.unet.config
        self.check_output_type(output_type)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end={callback_on_step_end!r} is not a function; give one, or none.")
        names = callback_on_step_end_tensor_inputs
        if not isinstance(names, list | tuple) or any(name not in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={names!r} is not a list of names among "
                f"{', '.join(self._callback_tensor_inputs)}."
            )
        if config.num_class_embeds is not None and not config.get("null_class_label", False):
            if labels is None:
                raise ValueError(
                    f"This UNet has no null label, so class_labels must be given: ids from 0 to "
                    f"{config.num_class_embeds - 1}, or names."
                )
            if not condition_unet:
                raise ValueError("This UNet has no null label, which condition_unet=False needs; leave that out.")

    def set_timesteps(
        self, num_inference_steps: int | None, respacing: str | None, timesteps: Sequence[int] | None
    ) -> None:
        """Sets the scheduler's timesteps from the given argument, or from the saved default."""
        total = self.scheduler.config.num_train_timesteps
        given = check_steps(total, num_inference_steps=num_inference_steps, respacing=respacing, timesteps=timesteps)
        is_default = not given
        if is_default:
            given = check_steps(total, **{name: self.default(name, None) for name in STEPS})
        if not self.has_adm_scheduler:
            set_solver_timesteps(self.scheduler, given, self._execution_device, is_default)
        else:
            if not given and self.scheduler.config.solver_order == 2:
                given = {"num_inference_steps": min(FEW_STEPS, len(self.scheduler) - 1)}
            self.scheduler.set_timesteps(**given, device=self._execution_device)

    def prepare_latents(
        self, latents: torch.Tensor | None, batch_size: int, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """The initial noise in float32, `(batch, channels, height, width)`, scaled for the scheduler."""
        check_latents(latents)
        channels, device = self.unet.config.in_channels, self._execution_device  # a slow search through the models
        if latents is None:
            shape = (batch_size, channels, *self.sample_size)
            latents = randn_tensor(shape, generators, device, torch.float32)
        elif latents.ndim != 4 or latents.shape[:2] != (batch_size, channels):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; {batch_size} images of this UNet need "
                f"({batch_size}, {channels}, height, width)."
            )
        return latents.to(device, torch.float32) * self.scheduler.init_noise_sigma
