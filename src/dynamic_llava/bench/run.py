"""A whole run: build, check the memory, measure the machine, then every phase on every workload."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from dynamic_llava.bench import machine, phases
from dynamic_llava.bench.building import (
    Subject,
    from_checkpoint,
    materialise,
    size_in_bytes,
    skeleton,
)
from dynamic_llava.bench.contenders import Contender, attached, stock
from dynamic_llava.bench.settings import BASELINES, DOWNSAMPLE, Settings, left_out
from dynamic_llava.bench.timing import Tick
from dynamic_llava.bench.workload import Workload, draw
from dynamic_llava.costs.presets import PRESETS
from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.environment import environment
from dynamic_llava.methods.downsample import grid_side

Progress = Callable[[str, int], Tick]  # of a name and a number of turns; returns what each turn calls


@torch.inference_mode()
def run(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Measure what ``settings`` ask for; return plain values, ready for JSON.

    Raises
    ------
    ValueError
        If it would not fit into memory, or the settings do not fit the model.
    """
    device, dtype = settings.torch_device, settings.torch_dtype
    with torch.inference_mode(False):  # tensors of inference mode could not be compiled with
        subject = _subject(settings, dtype, device)
    output = max(settings.output_tokens) + phases.WARM_UP
    work = draw(subject, max(settings.batches), settings.text_tokens, output, settings.seed)
    with torch.inference_mode(False):
        contenders = [_contender(subject, settings, name) for name in settings.contenders]
        overhead = _overhead(subject, settings) if "overhead" in settings.phases else []
    ability = {
        "read_bytes_per_second": machine.read_bandwidth(device),
        "matmul_flops_per_second": machine.matmul_rate(subject.model, work.batch * work.prompt),
    }
    bench = _Bench(settings, work, ability, progress)
    measured = {phase: bench.measure(phase, contenders, overhead) for phase in settings.phases}
    return {
        "settings": asdict(settings) | {"dtype": str(dtype).removeprefix("torch."), "device": str(device)},
        "model": {
            "layers": subject.model.config.text_config.num_hidden_layers,
            "image_tokens": subject.image_tokens,
            "weight_bytes": size_in_bytes(subject.model.parameters()),
        },
        "environment": environment(device),
        "ability": ability,
        "phases": measured,
        "process_peak_bytes": machine.process_peak_bytes(),
    }


class _Bench:
    """Runs phases on all workloads of a run."""

    def __init__(
        self, settings: Settings, work: Workload, ability: Mapping[str, float], progress: Progress
    ) -> None:
        self.settings, self.work, self.progress = settings, work, progress
        self.bandwidth = ability["read_bytes_per_second"]
        self.rate = ability["matmul_flops_per_second"]

    def measure(
        self, phase: str, contenders: Sequence[Contender], overhead: Sequence[Contender]
    ) -> list[dict[str, Any]]:
        """Return what a phase measured on each workload."""
        outputs = self.settings.output_tokens
        return [
            {"batch": batch, "prompt_tokens": self.work.prompt}
            | self._point(phase, contenders, overhead, batch, output)
            for batch in self.settings.batches
            for output in (outputs[:1] if phase == "prefill" else outputs)
        ]

    def _point(
        self,
        phase: str,
        contenders: Sequence[Contender],
        overhead: Sequence[Contender],
        batch: int,
        output: int,
    ) -> dict[str, Any]:
        if phase == "prefill":
            return {"contenders": self._prefill(phase, contenders, batch)}
        if phase == "decode":
            return {"output_tokens": output, "contenders": self._decode(phase, contenders, batch, output)}
        if phase == "overhead":
            return {
                "output_tokens": output,
                "prefill": self._prefill(f"{phase}, prefill", overhead, batch),
                "decode": self._decode(f"{phase}, decode", overhead, batch, output),
            }
        contenders = [contender for contender in contenders if contender.name not in left_out(phase)]
        work, repeats = self._work(contenders, batch, output), self.settings.repeats
        tick = self.progress(f"{phase}, batch {batch}", repeats * len(contenders))
        if phase == "generate":
            results = phases.generate(contenders, work, repeats, tick)
        else:
            results = phases.uncached(contenders, work, self.rate, repeats, tick)
        return {"output_tokens": output, "contenders": results}

    def _prefill(self, name: str, contenders: Sequence[Contender], batch: int) -> phases.Results:
        repeats = self.settings.repeats
        tick = self.progress(f"{name}, batch {batch}", repeats * len(contenders))
        return phases.prefill(contenders, self.work.part(batch, 0), self.rate, repeats, tick)

    def _decode(self, name: str, contenders: Sequence[Contender], batch: int, output: int) -> phases.Results:
        work = self._work(contenders, batch, output + phases.WARM_UP)
        chunks = len(phases.chunks_of(work.output))
        tick = self.progress(f"{name}, batch {batch}", chunks * len(contenders))
        if self.settings.compiled:
            torch.compiler.reset()  # another shape: what was compiled before counts against a limit
        return phases.decode(contenders, work, self.bandwidth, self.settings.compiled, tick)

    def _work(self, contenders: Sequence[Contender], batch: int, output: int) -> Workload:
        """Return a part of the workload, the contenders calibrated on it."""
        work = self.work.part(batch, output)
        for contender in contenders:
            contender.calibrate(work)
        return work


def _subject(settings: Settings, dtype: torch.dtype, device: torch.device) -> Subject:
    if settings.model not in PRESETS:
        subject = from_checkpoint(settings.model, dtype, device)
        _check_layer(settings, subject.model)
        _check_memory(settings, subject.model, subject.image_tokens, 0, dtype, device)
        return subject
    preset = PRESETS[settings.model]
    model = skeleton(preset, settings.layers)
    _check_layer(settings, model)
    weights = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    _check_memory(settings, model, preset.image_tokens, weights, dtype, device)
    model = materialise(model, dtype, device, settings.seed)
    return Subject(model, preset.image_tokens, preset.predictor)


def _check_layer(settings: Settings, model: Any) -> None:
    layers = model.config.text_config.num_hidden_layers
    if layers < 2:
        raise ValueError("--layers is 1: the first layer keeps everything, so take at least 2")
    if settings.layer >= layers:
        raise ValueError(
            f"--layer is {settings.layer}: the model has {layers} layers, choose 1 to {layers - 1}"
        )


def _check_memory(
    settings: Settings, model: Any, image_tokens: int, weights: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse what would not fit: weights, every contender's cache, one pass over the longest context."""
    text = model.config.text_config
    shape = DecoderShape.from_config(text)
    tokens = max(settings.batches) * (
        image_tokens + settings.text_tokens + max(settings.output_tokens) + phases.WARM_UP
    )
    caches = len(settings.contenders) * tokens * shape.layers * shape.kv_bytes_per_token(dtype.itemsize)
    one_pass = tokens * dtype.itemsize * (6 * shape.hidden + 3 * shape.intermediate)
    needed, available = weights + caches + one_pass, machine.available_bytes(device)
    if needed > available:
        raise ValueError(
            f"not enough memory on {device}: weights and caches need {needed / 1e9:.1f} GB, "
            f"{available / 1e9:.1f} GB are free; cut the model with --layers, or take a smaller "
            "--dtype, fewer --policies or a smaller --batch"
        )


def _contender(subject: Subject, settings: Settings, name: str) -> Contender:
    if name in BASELINES and name != "preallocated":
        return stock(subject, name)
    tokens = grid_side(subject.image_tokens, settings.image_keep_rate) ** 2 if name == DOWNSAMPLE else None
    return attached(subject, name, settings.sparsity(name, subject.predictor), tokens)


def _overhead(subject: Subject, settings: Settings) -> list[Contender]:
    """Return stock transformers, and attached sparsifiers that drop nothing: switched off, and deciding.

    At a keep rate of 1 only the output predictor runs: there is nothing to rank image tokens for.
    """
    off = settings.sparsity("preallocated", subject.predictor)
    deciding = settings.sparsity("learned", subject.predictor)
    deciding.image_keep_rate = deciding.text_keep_rate = 1.0
    return [
        stock(subject, "dense"),
        stock(subject, "static"),
        attached(subject, "attached, off", off),
        attached(subject, "attached, keeps all", deciding),
    ]
