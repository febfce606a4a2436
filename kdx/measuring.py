"""Taking a run's measures: what teacher and student say about the held-out rows, and to a few prompts from them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from kdx.causal_lm import DTYPES
from kdx.certificate import certify, words_of
from kdx.evaluate import HeldOut, Measures, answer, mass_past
from kdx.prepare import MAX_NEW_TOKENS, Prepared
from kdx.run.tracking import log, working
from kdx.teacher import Teacher


class Measurer:
    """Takes the held-out measures and sample answers of the run's student as it is at the time."""

    def __init__(self, run: Prepared, held_out: HeldOut) -> None:
        self.run, self.held_out = run, held_out
        self.prompts = run.prompts if run.config.tracking.samples else []

    def __call__(
        self, precision: AbstractContextManager[Any], check: Callable[[], None] = lambda: None
    ) -> tuple[Measures, Measures]:
        """Measure the student in a precision → its measures, and the teacher's from the same pass.

        check: called after each batch; what it raises ends that.
        """
        if not self.run.held_out_rows:
            return Measures([]), Measures([])
        self.ask()
        is_main = self.run.accelerator.is_main_process
        with working("measuring the student", len(self.held_out.batches), is_main) as advance:

            def after_each() -> None:
                advance()
                check()

            return self.held_out.measure(self.run.student, precision, after_each)

    def ask(self) -> None:
        """Let the teacher read the held-out rows, once."""
        teacher = self.run.teacher
        if teacher is None or self.held_out.teacher_head is not None or not self.run.held_out_rows:
            return
        is_main = self.run.accelerator.is_main_process
        with working("the teacher reads the held-out rows", len(self.held_out.batches), is_main) as advance:
            self.held_out.ask(teacher, advance)
        if teacher.store and teacher.store.certificate() is None:
            certificate = certify(teacher, self.run.held_out_rows, self.run.batches.pad_id)
            if certificate:
                log.info(words_of(certificate))
        if teacher.head.num_ids > self.run.num_ids:
            mass = mass_past(self.run.num_ids, teacher.head, self.held_out.teacher_hidden)
            rows = teacher.head.num_ids - self.run.num_ids
            log.info("the last %d rows of the teacher's head are padding and cut: %.2g of its mass", rows, mass)

    def answers(self, model: Any) -> list[str | None]:
        if model is None:
            return [None] * len(self.prompts)
        return [answer(model, self.run.tokenizer, p["text"], MAX_NEW_TOKENS) for p in self.prompts]

    def teacher_answers(self) -> list[str | None]:
        """The teacher's answers, from its store where they are there."""
        teacher = self.run.teacher
        if teacher is None:
            return [None] * len(self.prompts)
        answers: list[str | None] = []
        for prompt in self.prompts:
            key = f"{MAX_NEW_TOKENS} tokens: {prompt['text']}"
            told = teacher.store.answer(key) if teacher.store else None
            if told is None:
                told = answer(teacher.model, self.run.tokenizer, prompt["text"], MAX_NEW_TOKENS)
                if teacher.store:
                    teacher.store.keep_answer(key, told)
            answers.append(told)
        return answers

    def before_training(self, run: Prepared) -> dict[str, Any]:
        """What teacher and untouched student measure and answer."""
        untouched, teacher = self(run.accelerator.autocast())
        return {
            "untouched": untouched.means() | size(run.student, run.config.student.save_dtype),
            "teacher": teacher.means() | size_of_teacher(run.teacher),
            "teacher_samples": self.teacher_answers(),
            "untouched_samples": self.answers(run.student),
        }


def size_of_teacher(teacher: Teacher | None) -> dict[str, int | None]:
    """The same of a teacher whose body may not be loaded."""
    return {
        "num_parameters": teacher.num_parameters if teacher else None,
        "num_bytes": teacher.num_bytes if teacher else None,
    }


def size(model: Any, save_dtype: str | None = None) -> dict[str, int | None]:
    """Parameters, and the bytes of the weights: as they are in memory, or as they would be saved."""
    saved = DTYPES[save_dtype.replace("auto", "fp32")].itemsize if save_dtype else None
    num_bytes = sum(p.numel() * (saved or p.element_size()) for p in model.parameters())
    return {"num_parameters": model.num_parameters(), "num_bytes": num_bytes}
