"""What a person sees of a training: a bar with the time left, and a line of JSON for each logged step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SHOWN = ("loss", "answer_loss", "ratio_loss", "image_kept", "text_kept", "accuracy", "eval_loss")


class Bar(TrainerCallback):
    """A progress bar on stderr, of the first process."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=Console(stderr=True),
            disable=not state.is_world_process_zero,
        )
        self.progress.start()
        self.task = self.progress.add_task(
            self.title, total=state.max_steps, completed=state.global_step, shown=""
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move on."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the last numbers beside the bar."""
        numbers = [(name, value) for name, value in (logs or {}).items() if name in SHOWN]
        if numbers:
            self.progress.update(self.task, shown="  ".join(f"{name} {value:.3f}" for name, value in numbers))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if hasattr(self, "progress"):
            self.progress.stop()


class Log(TrainerCallback):
    """Appends what is logged to a file of JSON lines; a resumed run cuts off what it will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step that training goes on from."""
        self.started = time.perf_counter()
        if state.is_world_process_zero and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [
                line
                for line in lines
                if line.endswith("\n") and json.loads(line)["step"] <= state.global_step
            ]
            self.path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line, with the seconds since the one before."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        now = time.perf_counter()
        line = {"step": state.global_step, **logs, "seconds": now - self.started}
        self.started = now
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
