"""The conformance command, on forged golden folders: other sizes, GQA, prompt predictor, types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.verification.forge import Shape, write
from typer.testing import CliRunner, Result

from dynamic_llava.cli import app
from dynamic_llava.verification import Status, verify

SHAPES = {
    "grouped": Shape("llava_llama", seed=5),
    "question": Shape(question=True, seed=11),
    "vocabulary": Shape(
        hidden=32, layers=4, heads=4, key_heads=4, vocabulary=29952, image_size=56, keep_rate=0.25,
        question=True, seed=6,
    ),
}  # fmt: skip
KINDS = ("a_prefill_b1", "c_gen_cache_b1", "e_train", "f_multiturn", "g_preprocess")
INPUTS = {"input_ids", "pixel_values", "fed_tokens", "call_fed_lens", "labels", "attention_mask", "tau"}
INPUTS |= {"noise_image", "noise_output_text", "noise_instruct", "grad_names", "raw0", "raw1", "raw2"}


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forged")
    for name, shape in SHAPES.items():
        write(folder / name, shape)
    return folder


@pytest.fixture
def folder(forged: Path, tmp_path: Path) -> Path:
    """A configuration of its own, without golden files, to be filled."""
    made = tmp_path / "renamed"
    files = shutil.ignore_patterns("*.npz")
    return Path(shutil.copytree(forged / "question", made, ignore=files))


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def failures(folder: Path) -> dict[str, str]:
    return {r.quantity: r.reason for r in verify(folder) if r.status is Status.FAIL}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


# What passes


@pytest.mark.parametrize("name", SHAPES)
def test_forged_folder_passes(name: str, forged: Path) -> None:
    results = verify(forged / name)
    assert {result.status for result in results} == {Status.PASS}
    compared = {result.quantity for result in results}
    for kind in KINDS:
        assert set(arrays(forged / name / f"{kind}.npz")) - INPUTS <= compared
    assert ("instruct_decision" in compared) == SHAPES[name].question
    assert ("step_logits_logsumexp" in compared) == (name == "vocabulary")


def test_decisions_of_the_forged_folders_are_mixed(forged: Path) -> None:
    for name, shape in SHAPES.items():
        decisions = [arrays(forged / name / "c_gen_cache_b1.npz")["keep_decision"]]
        if shape.question:
            decisions.append(arrays(forged / name / "a_prefill_b1.npz")["instruct_decision"])
        assert all(0 < decision.mean() < 1 for decision in decisions)


def test_generation_without_cache_is_compared_with_cached_runs(forged: Path, folder: Path) -> None:
    cached = arrays(forged / "question" / "c_gen_cache_b1.npz")
    np.savez(folder / "d_gen_cache_same_input_b1.npz", **cached)
    inputs = {key: cached[key] for key in ("input_ids", "pixel_values", "tokens", "out_pred_logits")}
    np.savez(folder / "d_gen_nocache_stale_b1.npz", **inputs, first_input_ids=inputs["input_ids"][:, ::-1],
             first_pixel_values=inputs["pixel_values"])  # fmt: skip
    results = verify(folder)
    assert not [result for result in results if result.status is Status.FAIL]
    defects = [r.quantity for r in results if r.status is Status.DEFECT]
    assert defects == ["tokens", "out_pred_logits"]
    quantities = [result.quantity for result in results]
    assert "step_logits (without cache)" in quantities
    assert "row 0 without cache = cached alone: tokens" in quantities


def test_rows_of_a_batch_are_compared_with_their_single_runs(forged: Path, folder: Path) -> None:
    alone = arrays(forged / "question" / "c_gen_cache_b1.npz")
    both = {key: np.concatenate([alone[key]] * 2) for key in ("input_ids", "pixel_values")}
    references = {
        f"ref_row{row}_{key}": alone[key]
        for row in (0, 1)
        for key in ("tokens", "step_logits", "keep_decision", "kv_len_per_layer")
    }
    np.savez(folder / "c_gen_cache_b2_official.npz", **both, **references, tokens=np.zeros((2, 12), int))
    statuses = {result.quantity: result.status for result in verify(folder)}
    assert statuses.pop("tokens") is Status.DEFECT
    assert statuses == dict.fromkeys(references, Status.PASS)


def test_a_converted_checkpoint_passes_too(forged: Path, tmp_path: Path) -> None:
    source = forged / "question"
    converted = CliRunner().invoke(app, ["convert", str(source / "checkpoint"), str(tmp_path / "checkpoint")])
    assert converted.exit_code == 0
    for kind in KINDS:
        shutil.copy(source / f"{kind}.npz", tmp_path)
    assert {result.status for result in verify(tmp_path)} == {Status.PASS}


def test_prefill_variants_are_read_from_the_name(forged: Path, folder: Path) -> None:
    """Another keep rate must change the result, so the unchanged numbers fail under a name that asks it."""
    original = arrays(forged / "question" / "a_prefill_b1.npz")
    np.savez(folder / "a_prefill_b1_keep0.2.npz", **original)
    assert not failures(folder)
    (folder / "a_prefill_b1_keep0.2.npz").rename(folder / "a_prefill_b1_keep0.5.npz")
    assert "image_keep_index" in failures(folder)


# What fails


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_wrong_number_fails(name: str, kind: str, forged: Path, tmp_path: Path) -> None:
    shutil.copytree(forged / name / "checkpoint", tmp_path / "checkpoint")
    shutil.copytree(forged / name / "vision_tower", tmp_path / "vision_tower")
    changed = arrays(forged / name / f"{kind}.npz")
    expected = set(changed) - INPUTS
    for key in expected:
        entry = changed[key].reshape(-1)[-1 if key == "decision" else 0 :][:1]
        entry[...] = ~entry if entry.dtype == bool else entry + entry.dtype.type(1)
    np.savez(tmp_path / f"{kind}.npz", **changed)
    failed = {quantity.removesuffix(" (without eps)") for quantity in failures(tmp_path)}
    assert failed == expected


def test_a_crash_is_a_failure_with_its_line(forged: Path, folder: Path) -> None:
    content = arrays(forged / "question" / "a_prefill_b1.npz")
    del content["pixel_values"]
    np.savez(folder / "a_prefill_b1.npz", **content)
    assert "holds no array pixel_values" in failures(folder)["(run)"]


def test_a_file_of_an_unknown_kind_fails(folder: Path) -> None:
    np.savez(folder / "z_other.npz", x=np.zeros(1))
    assert "no check for this kind of file" in failures(folder)["(run)"]


def test_a_file_without_comparable_arrays_fails(forged: Path, folder: Path) -> None:
    content = arrays(forged / "question" / "a_prefill_b1.npz")
    np.savez(folder / "a_prefill_b1.npz", **{key: content[key] for key in ("input_ids", "pixel_values")})
    assert failures(folder) == {"(all)": "the file holds no array that could be compared"}


def test_wrong_shape_fails_with_both_shapes(forged: Path, folder: Path) -> None:
    content = arrays(forged / "question" / "a_prefill_b1.npz")
    content["logits"] = content["logits"][:, :-1]
    np.savez(folder / "a_prefill_b1.npz", **content)
    assert failures(folder).keys() == {"logits"}
    assert "expected" in failures(folder)["logits"]


# The command


def test_help_has_an_example() -> None:
    assert "Example: dynamic-llava verify" in run("--help").stdout


def test_command_prints_a_table_and_ends_with_0(forged: Path, folder: Path) -> None:
    shutil.copy(forged / "question" / "a_prefill_b1.npz", folder)
    outcome = run(folder)
    assert outcome.exit_code == 0
    assert "image_keep_index" in outcome.stdout
    assert "0 fail" in outcome.stdout


def test_command_ends_with_1_and_json_says_what_failed(forged: Path, folder: Path) -> None:
    content = arrays(forged / "question" / "a_prefill_b1.npz")
    content["image_keep_index"] += 1
    content["logits"][0, 0, 0] = np.nan
    np.savez(folder / "a_prefill_b1.npz", **content)
    outcome = run(folder, "--json")
    assert outcome.exit_code == 1
    told = json.loads(outcome.stdout.splitlines()[-1])
    assert not told["passed"]
    failed = {r["quantity"]: r for r in told["results"] if r["status"] == "fail"}
    assert failed.keys() == {"image_keep_index", "logits"}
    assert failed["image_keep_index"]["error"] == content["image_keep_index"].size
    assert failed["logits"]["reason"] == "not finite"
    assert told["counts"]["fail"] == 2


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "pickled"])
def test_command_refuses_bad_input_in_one_line(damage: str, forged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    if damage != "missing":
        folder.mkdir()
    if damage == "truncated":
        whole = (forged / "question" / "a_prefill_b1.npz").read_bytes()
        (folder / "a_prefill_b1.npz").write_bytes(whole[: len(whole) // 2])
    if damage == "pickled":
        np.savez(folder / "a_prefill_b1.npz", x=np.array([{}], dtype=object))
    outcome = run(folder, "--json")
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert str(folder) in outcome.stderr
    assert outcome.stderr.count("\n") == 1
