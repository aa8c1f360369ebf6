"""The phases: what is timed, on one workload, for all contenders in turn.

Each function returns a result by contender: see :class:`~dynamic_llava.bench.timing.Turns`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dynamic_llava.bench.bounds import Work
from dynamic_llava.bench.contenders import Contender, Session
from dynamic_llava.bench.machine import seconds, synchronise
from dynamic_llava.bench.timing import Tick, Turns, judge, spread
from dynamic_llava.bench.workload import Workload

CHUNKS = 20  # that an answer is decoded in
WARM_UP = 3  # output tokens before the first timed one, with compiling

Results = dict[str, dict[str, Any]]


def prefill(
    contenders: Sequence[Contender], work: Workload, rate: float, repeats: int, tick: Tick
) -> Results:
    """Time prefills, ``work`` without output tokens, each into a new cache; ``rate`` in FLOPs a second."""
    turns = Turns(work.fed_BT.device, [contender.name for contender in contenders], tick)
    turns.rounds(repeats, {c.name: functools.partial(_prefill_alone, c, work) for c in contenders})
    results = turns.results()
    dense = Work(Contender("dense", contenders[0].model), work).prefill_flops()
    for contender in contenders:
        flops = Work(contender, contender.given(work)).prefill_flops()
        judge(results[contender.name], dense / flops, flops / rate)
        results[contender.name]["flops"] = flops
    return results


def decode(
    contenders: Sequence[Contender], work: Workload, bandwidth: float, compiled: bool, tick: Tick
) -> Results:
    """Time output tokens in chunks, every contender with a cache of its own; bandwidth in bytes a second.

    The first tokens of ``work`` warm up and are not timed.
    """
    device = work.fed_BT.device
    sessions = {contender.name: Session(contender, work, compiled) for contender in contenders}
    for session in sessions.values():
        session.prefill()
        for number in range(WARM_UP):
            session.step(number)
    turns = Turns(device, list(sessions), tick)
    chunks: dict[str, list[dict[str, Any]]] = {name: [] for name in sessions}
    for start, stop in chunks_of(work.output):
        for name, session in sessions.items():
            turns.take(name, functools.partial(_decode, session, start, stop))
            chunks[name].append(_chunk(session, start, stop, turns.seconds[name][-1]))
    # Chunks differ in length by their rounding; times are those of one step.
    lengths = [stop - start for start, stop in chunks_of(work.output)]
    for name, times in turns.seconds.items():
        turns.seconds[name] = [time_ / steps for time_, steps in zip(times, lengths, strict=True)]
    results = turns.results()
    dense = Work(Contender("dense", contenders[0].model), work).decode_bytes(WARM_UP, work.output - 1)
    allocated = {name: session.allocated_bytes() for name, session in sessions.items()}
    for name, session in sessions.items():
        result, share = results[name], session.kept_share()
        least = Work(session.contender, session.work, share).decode_bytes(WARM_UP, work.output - 1)
        judge(result, dense / least, least / bandwidth)
        result |= {
            "ms_per_token": 1e3 * sum(chunk["seconds"] for chunk in chunks[name]) / (work.output - WARM_UP),
            "bytes_per_token": least,
            "kept_output_share": share,
            "cache_bytes_allocated": allocated[name],
            "cache_bytes_held": session.held_bytes(session.work.prompt + work.output),
            "chunks": chunks[name],
        }
        if "peak_bytes" in result:  # the caches of the others are there all the time
            result["peak_bytes"] -= sum(allocated.values()) - allocated[name]
    return results


def uncached(
    contenders: Sequence[Contender], work: Workload, rate: float, repeats: int, tick: Tick
) -> Results:
    """Time the last step of an answer without a cache; ``rate`` is in FLOPs a second."""
    turns = Turns(work.fed_BT.device, [contender.name for contender in contenders], tick)
    turns.rounds(repeats, {c.name: functools.partial(uncached_step, c, work) for c in contenders})
    results = turns.results()
    dense = Work(Contender("dense", contenders[0].model), work).uncached_flops()
    for contender in contenders:
        report = contender.sparsifier.report if contender.sparsifier else None
        kept = [] if report is None else report.text_kept
        share = sum(row.double().mean().item() for row in kept) / len(kept) if kept else 1.0
        flops = Work(contender, contender.given(work), share).uncached_flops()
        judge(results[contender.name], dense / flops, flops / rate)
        results[contender.name] |= {"flops": flops, "kept_output_share": share}
    return results


def generate(contenders: Sequence[Contender], work: Workload, repeats: int, tick: Tick) -> Results:
    """Time what a step of ``model.generate`` takes outside of the model."""
    turns = Turns(work.fed_BT.device, [contender.name for contender in contenders], tick)
    outside: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for round_number in range(repeats + 1):
        for contender in contenders:
            total, inside = _generate(contender, work)
            if round_number:  # the first one warms up
                turns.seconds[contender.name].append(total / work.output)
                outside[contender.name].append((total - inside) / work.output)
                tick()
    results = turns.results()
    for name, times in outside.items():
        results[name] |= {"outside_seconds": times, "outside": spread(times)}
    return results


def chunks_of(output: int) -> list[tuple[int, int]]:
    """Return from where to where the timed output tokens are decoded at a time."""
    steps = max(1, (output - WARM_UP) // CHUNKS)
    return [(start, min(start + steps, output)) for start in range(WARM_UP, output, steps)]


def uncached_step(contender: Contender, work: Workload) -> Tensor:
    """Compute the step after the whole answer without a cache; return the last logits."""
    work = contender.given(work)
    state = {}
    if contender.sparsifier is not None:  # what generate(use_cache=False) hands on
        state["past_key_values"] = contender.sparsifier.new_prompt(work.prompt)
    return contender.model(**work.all_inputs(), **state, use_cache=False, logits_to_keep=1).logits


def _prefill_alone(contender: Contender, work: Workload) -> None:
    Session(contender, work, compiled=False).prefill()


def _decode(session: Session, start: int, stop: int) -> None:
    for number in range(start, stop):
        session.step(number)


def _chunk(session: Session, start: int, stop: int, taken: float) -> dict[str, Any]:
    """Describe a chunk by its middle: the context of a step includes the token that is fed."""
    return {
        "context": session.work.prompt + (start + stop + 1) / 2,
        "steps": stop - start,
        "seconds": taken,
        "ms_per_token": 1e3 * taken / (stop - start),
        "output_tokens": stop,
        "cache_bytes_allocated": session.allocated_bytes(),
        "cache_bytes_held": session.held_bytes(session.work.prompt + stop),
    }


def _generate(contender: Contender, work: Workload) -> tuple[float, float]:
    """Generate an answer; return the seconds of it all and of those within the model."""
    model, device, work = contender.model, work.fed_BT.device, contender.given(work)
    forward, inside = model.forward, 0.0

    @functools.wraps(forward)
    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        synchronise(device)
        start = time.perf_counter()
        outputs = forward(*args, **kwargs)
        synchronise(device)
        inside += time.perf_counter() - start
        return outputs

    def answer() -> None:
        model.generate(**work.prompt_inputs(), max_new_tokens=work.output, do_sample=False)

    model.forward = timed_forward
    try:
        total = seconds(device, answer)
    finally:
        del model.forward
    return total, inside
