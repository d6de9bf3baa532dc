"""Answers of a model: transformers' generate in batches, or an OpenAI-compatible server.

Both get the same token ids. One call is one chunk of problems with a seed of its own, so that what
a chunk gives does not depend on those before it: a killed run goes on at the next chunk.
"""

from __future__ import annotations

import gc
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from infold.disk import storage_errors
from infold.errors import Refusal, StorageFailure
from infold.loop.config import Collect
from infold.loop.task import Prompt, short
from infold.sizes import plural
from infold.tuners.loading import calm, load_model, most_tokens, pad_id, tokenizer_of
from infold.tuners.tokens import special_ids

__all__ = ["Engine", "open_engine"]

PATIENCE = 600  # seconds for a server to load a model
_ENDING = 30  # and to end, until it is killed


class Engine(Protocol):
    def answers(self, prompts: Sequence[Prompt], samples: int, seed: int) -> list[list[str]]:
        """`samples` answers for each prompt; 0 asks for the one that is most likely."""
        ...


@contextmanager
def open_engine(model: Path, settings: Collect, log: Path) -> Iterator[Engine]:
    """The model's engine; its memory is free, and its server ended, behind the block."""
    if settings.server:
        with _served(model, settings, log) as engine:
            yield engine
        return
    local = _Local(model, settings)
    try:
        yield local
    finally:
        del local.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def prompt_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """The ids that a training on this prompt would have in front of the answer."""
    if isinstance(prompt, str):
        before, _ = special_ids(tokenizer)
        return [*before, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    if not getattr(tokenizer, "chat_template", None):
        raise Refusal("task: prompt gives messages, and the base has no chat template; give texts")
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and refuses as it likes
        raise Refusal(
            f"task: the base's chat template does not take {short(prompt)}: {error}"
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    ends = [place for s in stop if (place := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text


class _Local:
    """transformers' generate on one device."""

    def __init__(self, model: Path, settings: Collect) -> None:
        self.settings = settings
        self.tokenizer = tokenizer_of(model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # float32 holds every bfloat16 and float16 exactly, and processors compute with it faster
        dtype: Any = "auto" if self.device == "cuda" else torch.float32
        self.model = load_model(model, torch.device(self.device), dtype, strangers=True)
        self.pad = pad_id(self.tokenizer)

    @torch.inference_mode()
    def answers(self, prompts: Sequence[Prompt], samples: int, seed: int) -> list[list[str]]:
        rows = [prompt_ids(prompt, self.tokenizer) for prompt in prompts]
        widths = list(map(len, rows))
        width = max(widths)
        most = most_tokens(self.model.config)
        if most is not None and width + self.settings.max_tokens > most:
            raise Refusal(
                f"task: a prompt has {width:,} tokens, with collect.max_tokens "
                f"{width + self.settings.max_tokens:,}, and the base takes {most:,}; lower "
                f"collect.max_tokens, or shorten the prompt: {short(prompts[widths.index(width)])}"
            )
        ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        torch.manual_seed(seed)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if samples:
            sampling = {
                "do_sample": True,
                "temperature": self.settings.temperature,
                "top_p": self.settings.top_p,
                "num_return_sequences": samples,
            }
        stop = list(self.settings.stop)
        with calm():
            out = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=self.settings.max_tokens,
                pad_token_id=self.pad,
                top_k=None,
                **({"stop_strings": stop, "tokenizer": self.tokenizer} if stop else {}),
                **sampling,
            )
        texts = self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        each = max(1, samples)
        return [
            [cut(text, stop) for text in texts[start : start + each]]
            for start in range(0, len(texts), each)
        ]


class _Remote:
    """A server that speaks OpenAI's completions; prompts go there as token ids."""

    def __init__(self, client: Any, model: Path, name: str, settings: Collect) -> None:
        self.client, self.name, self.settings = client, name, settings
        self.tokenizer = tokenizer_of(model)

    def answers(self, prompts: Sequence[Prompt], samples: int, seed: int) -> list[list[str]]:
        each = max(1, samples)
        found = self.client.completions.create(
            model=self.name,
            prompt=[prompt_ids(prompt, self.tokenizer) for prompt in prompts],
            n=each,
            seed=seed,
            max_tokens=self.settings.max_tokens,
            stop=list(self.settings.stop) or None,
            temperature=self.settings.temperature if samples else 0.0,
            top_p=self.settings.top_p if samples else 1.0,
        )
        choices = sorted(found.choices, key=lambda choice: choice.index)
        if len(choices) != each * len(prompts):
            raise StorageFailure(
                f"collect.server {self.settings.server}: gave {plural('answer', len(choices))} to "
                f"{plural('prompt', len(prompts))}, where {each} to each were asked for; does it "
                "take lists of prompts, and n?"
            )
        texts = [cut(choice.text, self.settings.stop) for choice in choices]
        return [texts[start : start + each] for start in range(0, len(texts), each)]


@contextmanager
def _served(model: Path, settings: Collect, log: Path) -> Iterator[Engine]:
    """Start the server's command on these weights, wait until it answers, end it behind."""
    from openai import OpenAI, OpenAIError

    assert settings.serve and settings.server
    words = [word.replace("{model}", str(model)) for word in shlex.split(settings.serve)]
    client = OpenAI(
        base_url=settings.server,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        timeout=PATIENCE,
        max_retries=0,
    )
    if _listed(client, OpenAIError):
        raise Refusal(
            f"collect.server {settings.server}: another server answers there; it may have other "
            "weights: end it, or choose another port"
        )
    if shutil.which(words[0]) is None:
        raise Refusal(f"collect.serve: {words[0]}: there is no such command")
    leash = [sys.executable, "-m", "infold.leash", str(_ENDING), *words]
    with storage_errors(log), open(log, "ab") as output:  # it ends too where we are killed
        child = subprocess.Popen(
            leash, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while not (names := _listed(client, OpenAIError)):
            if child.poll() is not None:
                raise StorageFailure(
                    f"collect.serve: the server ended with code {child.returncode}; see {log}"
                )
            if time.monotonic() > deadline:
                raise StorageFailure(
                    f"collect.server {settings.server}: no answer for {PATIENCE} s; is that where "
                    f"collect.serve listens? See {log}"
                )
            time.sleep(0.2)
        try:
            yield _Remote(client, model, names[0], settings)
        except OpenAIError as error:
            raise StorageFailure(f"collect.server {settings.server}: {error}; see {log}") from error
    finally:
        assert child.stdin is not None
        child.stdin.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                child.wait(_ENDING + 5)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _listed(client: Any, failure: type[Exception]) -> list[str]:
    try:
        return [model.id for model in client.models.list().data]
    except failure:
        return []
