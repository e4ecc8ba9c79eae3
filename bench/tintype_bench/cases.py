"""The cases of each suite: which model at which settings, and who runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from tintype.errors import RequestError
from tintype_bench.measure import Plan
from tintype_bench.runners import PEERS, STABLE_DIFFUSION_CPP
from tintype_bench.shapes import SHAPES
from tintype_bench.work import PROMPT, Runner


@dataclass(frozen=True)
class Case:
    """A model (a shape, a model in the box, or a path) at some settings, and its runners.

    ``note`` says what a case is beside a plain one, such as a size that no bundle was built for. ``in_turn`` is for
    models of which memory holds one at a time.
    """

    model: str
    width: int
    height: int
    batch: int
    steps: int
    guidance: float
    runners: tuple[Runner, ...]
    component: str = ""
    note: str = ""
    in_turn: bool = False
    prompt: str = PROMPT
    scheduler: str = ""
    noise: str = "tintype"

    @property
    def name(self) -> str:
        """What tables and resumed runs know the case by."""
        if self.component:
            what = f"{self.component} alone, {self.batch} rows"
        else:
            what = f"batch {self.batch}, {self.steps} steps, guidance {self.guidance:g}"
        method = f"{self.scheduler} from {self.noise}'s noise" if self.scheduler else ""
        note = "".join(f", {words}" for words in (method, self.note) if words)
        return f"{self.model} {self.width}x{self.height}, {what}{note}"


def ours(backend: str, *precisions: str) -> tuple[Runner, ...]:
    """Tintype on a backend, once a precision."""
    return tuple(Runner("tintype", each, backend) for each in precisions)


_COMPILED = Runner("diffusers-compiled", "bf16")
# max-autotune makes and tries C++ for every matrix product of every shape, too long for a CPU at full size.
_COMPILED_SOON = replace(_COMPILED, mode="default")
_EAGER = Runner("diffusers", "fp32")
_ORT, _OPENVINO = Runner("onnxruntime", "fp32"), Runner("openvino", "bf16")
_OWN_GRAPHS = (*ours("onnxruntime", "fp32"), *ours("openvino", "bf16"))
_POSTCARD = (*_OWN_GRAPHS, *ours("torch", "fp32"), _EAGER, _ORT, _OPENVINO)
_ANY_SIZE = (*ours("torch", "fp32"), _EAGER)


def quick() -> Iterator[Case]:
    """Two minutes: the model in the box."""
    yield Case("postcard", 128, 128, 1, 20, 4.0, _POSTCARD)
    yield Case("postcard", 128, 128, 2, 1, 4.0, _POSTCARD, component="denoise")
    yield Case("postcard", 160, 96, 1, 20, 4.0, _ANY_SIZE, note="a size no graph was built for")


def cpu() -> Iterator[Case]:
    """SD 1.5's UNet and whole pictures at full size; postcard compiled, and what its promise of equal bytes costs."""
    eight_bits = (*ours("onnxruntime", "int8"), *ours("openvino", "int8"))
    unet = (*ours("torch", "bf16"), *_OWN_GRAPHS, *eight_bits)
    unet += (_COMPILED_SOON, Runner("diffusers", "bf16"), _OPENVINO, _ORT)
    yield Case("sd15", 512, 512, 2, 1, 7.5, unet, component="denoise", in_turn=True)
    whole = (*ours("openvino", "bf16", "int8"), *ours("onnxruntime", "int8"), _COMPILED_SOON)
    whole += (Runner("diffusers", "bf16"), _OPENVINO)
    yield Case("sd15", 512, 512, 1, 4, 7.5, whole, in_turn=True)
    yield Case("postcard", 128, 128, 1, 20, 4.0, (*_OWN_GRAPHS, _COMPILED, _OPENVINO))
    invariant = Runner("tintype", "fp32", "torch", invariant=True)
    yield Case("postcard", 128, 128, 4, 20, 4.0, (*ours("torch", "fp32"), invariant, _EAGER))


def scale() -> Iterator[Case]:
    """What a picture costs by size, batch and steps, the others held still."""
    for side in (64, 96, 128, 192, 256):
        yield Case("postcard", side, side, 1, 10, 4.0, _ANY_SIZE, note="by size")
    for batch in (1, 2, 4, 8):
        yield Case("postcard", 128, 128, batch, 10, 4.0, _ANY_SIZE, note="by batch")
    for steps in (5, 10, 20, 40):
        yield Case("postcard", 128, 128, 1, steps, 4.0, _ANY_SIZE, note="by steps")


@dataclass(frozen=True)
class Published:
    """A published setting of a generator, timed on a GPU."""

    shape: str
    side: int
    steps: int
    guidance: float
    note: str = ""


GENERATORS = (
    Published("sd15", 512, 50, 7.5),
    Published("sd15", 512, 20, 7.5),
    Published("sdxl", 1024, 30, 5.0),
    # MLPerf Inference's text-to-image setting: Euler's method and one fixed latent, as all of these have.
    Published("sdxl", 1024, 20, 8.0, "MLPerf's settings"),
    Published("sd3-medium", 1024, 28, 7.0),
    Published("flux1-dev", 1024, 28, 3.5),
    Published("flux1-schnell", 1024, 4, 0.0),
    Published("karlo", 256, 25, 8.0),
)
_BATCHES = (4, 8, 16)  # of which the report names the one with the best throughput


def gpu(device: str = "cuda") -> Iterator[Case]:
    """Whole generators in 16 and 8 bits beside diffusers eager and compiled, one picture and batches of them."""
    own = ours("torch", "bf16", "fp8", "int8")
    # A CPU, on which the suite is tried out, has no graphs.
    fastest = "compiled" if device == "cpu" else "graph"
    runners = (*own, *(replace(each, execution=fastest) for each in own))
    runners += (Runner("diffusers", "bf16"), _COMPILED)
    for setting in GENERATORS:
        yield _generator_case(setting, 1, runners)
    for setting in _least_steps():
        for batch in _BATCHES:
            yield _generator_case(replace(setting, note="for throughput"), batch, runners)


def _least_steps() -> list[Published]:
    """Each shape's cheapest plain setting: what a batch is worth does not depend on the steps."""
    plain = sorted((each for each in GENERATORS if not each.note), key=lambda each: -each.steps)
    return list({each.shape: each for each in plain}.values())


# Of which no GPU holds three in 16 bits with their text encoders.
_LARGE = ("flux1-dev", "flux1-schnell", "sd3-medium")


def _generator_case(setting: Published, batch: int, runners: tuple[Runner, ...]) -> Case:
    return Case(
        setting.shape,
        setting.side,
        setting.side,
        batch,
        setting.steps,
        setting.guidance,
        runners,
        note=setting.note,
        in_turn=setting.shape in _LARGE,
    )


def tiny(case: Case) -> Case:
    """The same case small enough to try a suite out: 64 pixels, a step for each twenty and one."""
    if case.model not in SHAPES:
        return case
    return replace(case, width=64, height=64, steps=1 + case.steps // 20)


def on_device(case: Case, device: str) -> Case:
    """The case with everybody on `device`; who cannot be there says so when it is loaded."""
    runners = tuple(replace(runner, device=device) for runner in case.runners)
    return replace(case, runners=runners)


def without_bf16(case: Case) -> Case:
    """The case for a device that only imitates bfloat16: who would compute in it does so in float32, each once."""
    wide = (
        replace(runner, precision="fp32") if runner.precision == "bf16" else runner
        for runner in case.runners
    )
    return replace(case, runners=tuple(dict.fromkeys(wide)))


def of_model(model: str, settings: dict[str, float], *, bundle: bool) -> Case:
    """The case of a model that the user names, at its own settings."""
    runners = _OWN_GRAPHS if bundle else ours("torch", "fp32", "bf16")
    peers = (_ORT, _OPENVINO) if bundle else (_EAGER, Runner("diffusers", "bf16"))
    return Case(
        model,
        int(settings["width"]),
        int(settings["height"]),
        1,
        int(settings["num_inference_steps"]),
        float(settings["guidance_scale"]),
        (*runners, *peers),
    )


def of_shape(shape: str) -> Case:
    """A shape at its first published setting, in what its weights are stored in."""
    setting = next(each for each in GENERATORS if each.shape == shape)
    return _generator_case(setting, 1, (*ours("torch", "bf16"), Runner("diffusers", "bf16")))


# What a peer that a suite does not have by itself is timed in.
_ADDED_IN = {"diffusers-compiled": ("bf16",), STABLE_DIFFUSION_CPP: ("fp16", "int8")}
# stable-diffusion.cpp brings a vocabulary of its own, in which only single letters are what shapes' tokenizers make of
# them; it has torch's noise and not ours, and Euler's method among those that published checkpoints ask for.
_SPELLED = " ".join(PROMPT.replace(" ", ""))


def chosen_peers(case: Case, peers: Sequence[str] | None, commands: Sequence[str]) -> Case:
    """The case with these peers alone (None: its own; "none": nobody), and the user's commands."""
    known = (*PEERS, "none")
    if unknown := [name for name in peers or () if name not in known]:
        raise RequestError(f"--peer {unknown[0]} is unknown; choose among {', '.join(known)}")
    kept = tuple(r for r in case.runners if r.ours or peers is None or r.kind in peers)
    present = {runner.kind for runner in kept}
    added = tuple(
        Runner(name, precision)
        for name in peers or ()
        if name not in (*present, "none")
        for precision in _ADDED_IN.get(name, ("fp32",))
    )
    if STABLE_DIFFUSION_CPP in (peers or ()) and not case.component:
        case = replace(case, prompt=_SPELLED, scheduler="euler", noise="torch")
    # In which precision a command computes is its own business, so it is held to what 16 bits are.
    told = () if case.component else tuple(Runner("command", "bf16", command=c) for c in commands)
    return replace(case, runners=(*kept, *added, *told))


def chosen_runners(case: Case, texts: Sequence[str] | None) -> Case:
    """The case with those alone who have one of the texts in their name, and the user's commands."""
    if texts is None:
        return case
    named = [r for r in case.runners if any(fnmatchcase(r.label, f"*{t}*") for t in texts)]
    kept = tuple(r for r in case.runners if r in named or r.kind == "command")
    if not named:
        known = ", ".join(runner.label for runner in case.runners)
        raise RequestError(f"--runner {' '.join(texts)} leaves nobody of {case.name}: {known}")
    return replace(case, runners=kept)


CASES = {"quick": quick, "cpu": cpu, "scale": scale, "gpu": gpu}
# How often, where it is not said: quick in two minutes, the others as long as a part may take.
PLANS = {"quick": Plan(2, 5), "cpu": Plan(2, 3), "scale": Plan(2, 3), "gpu": Plan(2, 5)}
