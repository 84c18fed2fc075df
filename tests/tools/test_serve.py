"""serve and chat: clients of OpenAI's API at transformers' server, with the demo's model and a tokenizer of bytes."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from packaging.requirements import Requirement
from paths import REPO

import mxfp4_compile
from mxfp4_compile.tools.commands import serve
from mxfp4_compile.tools.demo import MODEL_DIRECTORY, load
from mxfp4_compile.tools.main import build_parser, main

CONTEXT = 1024  # of the demo's model
PROMPT = "TIMON:\n"
QUESTION = "Who is Timon?"
CHAT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"  # by byte_tokenizer.TEMPLATE
WAIT = 120.0  # seconds after which something that must happen counts as not happening
GREEDY = {"temperature": 0, "max_tokens": 12}


# without a server


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    args = build_parser().parse_args(["serve", "model"])
    assert (args.host, args.port, args.quantize, args.continuous_batching) == ("127.0.0.1", 8000, False, False)
    args = build_parser().parse_args(["chat", "model", "--set", "do_sample=False", "max_new_tokens=5"])
    assert args.set == ["do_sample=False", "max_new_tokens=5"]
    for port in ("65536", "-1", "http"):
        with pytest.raises(SystemExit) as done:
            main(["serve", "model", "--port", port])
        assert done.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "default: 127.0.0.1, this machine alone" in out and "--continuous-batching" in out


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("uvicorn", "rich") else find("re"))
    for command, missing in (("serve", "uvicorn"), ("chat", "uvicorn, rich")):
        assert main([command, str(MODEL_DIRECTORY)]) == 1
        assert capsys.readouterr().err == (
            f'mxfp4-compile: error: {command} needs {missing}: pip install "mxfp4_compile[serve]"\n'
        )


def test_the_extra_installs_what_is_asked_for() -> None:
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    extras = dict(re.findall(r"^(\w+) = \[(.*)\]$", text, re.M))
    installed = {Requirement(name).name for name in re.findall(r'"(.*?)"', extras["serve"])}
    assert {*serve.NEEDED, "rich"} <= installed and "mxfp4_compile[hf,serve]" in extras["test"]


def test_chat_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(MODEL_DIRECTORY), "--json"]) == 1
    assert "chat is for people; for programs there is mxfp4-compile serve" in capsys.readouterr().err


@pytest.fixture(scope="module")
def serving() -> Any:
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    from mxfp4_compile.tools import serving

    return serving


def test_what_does_not_fit_is_refused(serving: Any) -> None:
    """And an answer ends where the context does, or the pages of continuous batching."""
    from fastapi import HTTPException

    model = load_config_of_demo()

    def left(prompt: int, wanted: int | None, room: int | None = None) -> int | None:
        config = SimpleNamespace(max_new_tokens=wanted)
        for ids in ([1] * prompt, torch.ones(1, prompt, dtype=torch.int64)):
            serving.fit("demo", model, {"input_ids": ids}, config, room)
        return config.max_new_tokens

    assert left(10, 100) == 100 and left(CONTEXT - 3, 100) == 3 and left(CONTEXT - 1, 1) == 1
    assert left(10, None) is None
    assert left(10, 100, room=64) == 54 and left(10, 2000, room=1 << 20) == CONTEXT - 10
    for arguments, said in (
        ((CONTEXT, 5), "The prompt has 1024 tokens; the context of 'demo' has 1024, one of which at least is"),
        ((70, 5, 64), "The prompt has 70 tokens; the pages of continuous batching hold 64,"),
        ((10, 0), "An answer of 0 tokens was asked for"),
        ((0, 5), "The prompt has no tokens."),
    ):
        with pytest.raises(HTTPException, match=re.escape(said)) as refused:
            left(*arguments)
        assert refused.value.status_code == 400
    model.config.get_text_config = lambda decoder: SimpleNamespace()
    assert left(CONTEXT, 100) == 100, "a model without a limit"


def load_config_of_demo() -> Any:
    from transformers import AutoConfig

    return SimpleNamespace(config=AutoConfig.from_pretrained(MODEL_DIRECTORY))


def test_what_cannot_be_served_is_said(serving: Any) -> None:
    source = serving.Source(str(MODEL_DIRECTORY), "cpu")
    with pytest.raises(ValueError, match=r"is not quantized: --quantize makes its experts MXFP4 while it is read"):
        source.model()
    with pytest.raises(ValueError, match=r"has no tokenizer: text cannot be served without one"):
        source.processor()


# with one


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model in fp32 as compressed-tensors, with a tokenizer."""
    path = tmp_path_factory.mktemp("served") / "demo"
    model = mxfp4_compile.optimize(load(MODEL_DIRECTORY).float(), verify=False)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def served(serving: Any, directory: Path) -> Iterator[Any]:
    with serving.Server(serving.Source(str(directory), "cpu"), port=0, log_level="warning") as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[Any]:
    with client_of(served.url) as client:
        yield client


def client_of(url: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=WAIT)


@pytest.fixture(scope="module")
def text(directory: Path) -> Callable[[str, int], str]:
    """What the model continues a prompt with, by ``generate`` itself."""
    model = mxfp4_compile.load(directory, device_map="cpu").eval()

    def text(prompt: str, tokens: int = GREEDY["max_tokens"]) -> str:
        ids = torch.tensor([list(prompt.encode())])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return bytes(out[0, ids.shape[1] :].tolist()).decode(errors="replace")

    return text


def loaded(served: Any) -> Any:
    """The model that a server holds, with its processor."""
    (timed,) = served._manager.loaded_models.values()
    return timed


def post(url: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    from huggingface_hub.utils import httpx  # which the openai client brings too

    answer = httpx.post(url.removesuffix("/v1") + path, json=body, timeout=WAIT)
    return answer.status_code, answer.json()


def ask(client: Any, directory: Path, prompt: str, **options: Any) -> Any:
    return client.completions.create(model=str(directory), prompt=prompt, **{**GREEDY, **options})


@pytest.mark.slow
def test_where_and_what(served: Any, client: Any, directory: Path) -> None:
    assert served._socket.getsockname()[0] == "127.0.0.1" and served.url.startswith("http://127.0.0.1:")
    assert [model.id for model in client.models.list()] == [str(directory)]
    from huggingface_hub.utils import httpx

    health = httpx.get(served.url.removesuffix("/v1") + "/health", timeout=WAIT)
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert len(served.report.rewritten) == 4 and "no CUDA graphs on cpu" in str(served.report)


@pytest.mark.slow
def test_completions_and_chat(client: Any, directory: Path, text: Callable[..., str]) -> None:
    done = ask(client, directory, PROMPT)
    assert done.choices[0].text == text(PROMPT)
    assert done.choices[0].finish_reason == "length" and done.model == str(directory)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(PROMPT), 12)

    messages = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model=str(directory), messages=messages, **GREEDY)
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content == text(CHAT)

    response = client.responses.create(model=str(directory), input=QUESTION, temperature=0, max_output_tokens=12)
    assert response.output_text == text(CHAT)


@pytest.mark.slow
def test_streams(client: Any, directory: Path, text: Callable[..., str]) -> None:
    chunks = list(ask(client, directory, PROMPT, stream=True))
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert len(list(filter(None, pieces))) > 1 and "".join(pieces) == text(PROMPT)
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 12

    messages = [{"role": "user", "content": QUESTION}]
    chat = list(client.chat.completions.create(model=str(directory), messages=messages, stream=True, **GREEDY))
    assert "".join(c.choices[0].delta.content or "" for c in chat) == text(CHAT)


@pytest.mark.slow
def test_two_clients_at_once(client: Any, directory: Path, text: Callable[..., str]) -> None:
    prompts = [PROMPT, "APEMANTUS:\n", "FLAVIUS:\nMy lord,", "Enter"]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: ask(client, directory, prompt).choices[0].text, prompts))
    assert together == [text(prompt) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_in_the_middle(
    served: Any, client: Any, directory: Path, text: Callable[..., str], stream: bool
) -> None:
    """Its answer is not written to the end, and the next request is served."""
    begun, gone, tokens = threading.Event(), threading.Event(), []

    def count(*_: Any) -> None:
        if not begun.is_set() or gone.is_set():
            tokens.append(1)
            if len(tokens) == 3:
                begun.set()
                gone.wait(WAIT)
            elif len(tokens) > 3:
                time.sleep(0.05)  # the 900 tokens would take 45 s more: ample time to see that the client has gone

    hook = loaded(served).model.register_forward_hook(count)
    try:
        host, port = served.url.split("/")[2].split(":")
        body = json.dumps({"model": str(directory), "prompt": PROMPT, "max_tokens": 900, "stream": stream}).encode()
        with socket.create_connection((host, int(port)), timeout=WAIT) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            assert begun.wait(WAIT)
        gone.set()
        assert served._state.get_manager(str(directory)).submit(hook.remove).result(WAIT) is None  # after that answer
    finally:
        gone.set()
        hook.remove()
    assert 3 <= len(tokens) < 900
    assert ask(client, directory, PROMPT).choices[0].text == text(PROMPT)


@pytest.mark.slow
def test_an_oversized_prompt(client: Any, directory: Path) -> None:
    from openai import BadRequestError

    said = re.escape(f"tokens; the context of '{directory}' has {CONTEXT}, one of which at least is for the answer.")
    for stream in (False, True):
        with pytest.raises(BadRequestError, match=rf"The prompt has 1100 {said}"):
            ask(client, directory, "a" * 1100, stream=stream)
        with pytest.raises(BadRequestError, match=said):
            client.chat.completions.create(
                model=str(directory), messages=[{"role": "user", "content": "a" * 1100}], stream=stream
            )
    with pytest.raises(BadRequestError, match=said):
        client.responses.create(model=str(directory), input="a" * 1100)
    with pytest.raises(BadRequestError, match="An answer of 0 tokens was asked for"):
        ask(client, directory, PROMPT, max_tokens=0)
    done = ask(client, directory, "a" * (CONTEXT - 3), max_tokens=50)
    assert (done.choices[0].finish_reason, done.usage.total_tokens) == ("length", CONTEXT)


@pytest.mark.slow
def test_another_model(served: Any, client: Any, directory: Path) -> None:
    from openai import BadRequestError

    said = f"Server is pinned to '{directory}'; requested 'some/other'."
    with pytest.raises(BadRequestError, match=re.escape(said)):
        client.completions.create(model="some/other", prompt=PROMPT)
    status, body = post(served.url, "/load_model", {"model": "some/other"})
    assert (status, body["error"]["message"]) == (400, said)
    assert post(served.url, "/load_model", {"model": f"{directory}:x.gguf"})[0] == 400
    assert post(served.url, "/v1/completions", {"prompt": PROMPT, "max_tokens": 1})[0] == 200, "none is the pinned one"


@pytest.mark.slow
def test_a_conversation_that_cannot_be_written_down(
    served: Any, client: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openai import BadRequestError

    messages = [{"role": "user", "content": "Hello"}]
    monkeypatch.setattr(loaded(served).processor, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRequestError, match="The chat template refuses this conversation: roles must alternate"):
        client.chat.completions.create(model=str(directory), messages=messages)
    monkeypatch.setattr(loaded(served).processor, "chat_template", None)
    with pytest.raises(BadRequestError, match="has no chat template; /v1/completions works without one"):
        client.chat.completions.create(model=str(directory), messages=messages)
    with pytest.raises(BadRequestError, match="has no chat template"):
        client.responses.create(model=str(directory), input="Hello")
    assert ask(client, directory, PROMPT, max_tokens=1).choices[0].text


@pytest.mark.slow
def test_an_error_of_the_model(
    served: Any, client: Any, directory: Path, text: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from openai import APIError, InternalServerError

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError('a "quoted" error\nof two lines')

    messages = [{"role": "user", "content": QUESTION}]
    with monkeypatch.context() as patched:
        patched.setattr(loaded(served).model, "generate", fails)
        with pytest.raises(APIError, match='a "quoted" error\nof two lines'):
            list(ask(client, directory, PROMPT, stream=True))
        with pytest.raises(APIError, match='a "quoted" error\nof two lines'):
            list(client.chat.completions.create(model=str(directory), messages=messages, stream=True))
        with pytest.raises(InternalServerError, match='RuntimeError: a "quoted" error\nof two lines'):
            ask(client, directory, PROMPT)
    assert ask(client, directory, PROMPT).choices[0].text == text(PROMPT)


@pytest.mark.slow
def test_reset_loads_the_model_anew(served: Any, client: Any, directory: Path, text: Callable[..., str]) -> None:
    before = loaded(served).model
    assert post(served.url, "/reset", {}) == (200, {"status": "ok"})
    assert ask(client, directory, PROMPT).choices[0].text == text(PROMPT)
    assert loaded(served).model is not before


@pytest.mark.slow
def test_continuous_batching(serving: Any, directory: Path, text: Callable[..., str]) -> None:
    prompts = [PROMPT, "APEMANTUS:\n", "Enter"]
    source = serving.Source(str(directory), "cpu")
    with (
        serving.Server(source, port=0, continuous_batching=True, log_level="warning") as server,
        client_of(server.url) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        assert server.report.runtime.notes == [serving.CONTINUOUS_BATCHING]
        got = list(pool.map(lambda prompt: ask(client, directory, prompt).choices[0].text, prompts))
        assert got == [text(prompt) for prompt in prompts]
        chunks = list(ask(client, directory, PROMPT, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == text(PROMPT)
        status, said = post(server.url, "/v1/completions", {"prompt": "a" * 1100})
        assert status == 400 and f"the context of '{directory}' has {CONTEXT}" in said["error"]["message"]
        manager = server._state.get_manager(str(directory), use_cb=True)
        assert manager._room() is not None and manager._room() >= CONTEXT
        manager.scheduler.cache.num_blocks = 2
        status, said = post(server.url, "/v1/completions", {"prompt": "a" * 600})
        assert status == 400 and "the pages of continuous batching hold 512" in said["error"]["message"]


@pytest.mark.slow
def test_a_port_in_use_is_said_before_the_model_is_loaded(
    serving: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.Source, "model", lambda self: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(MODEL_DIRECTORY), "--port", str(taken.getsockname()[1])]) == 1
    assert "in use" in capsys.readouterr().err


@pytest.mark.slow
def test_a_conversation_in_the_terminal(
    directory: Path,
    text: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("openai")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\nn\n!exit\n"))
    assert main(["chat", str(directory), "--set", "do_sample=False", "max_new_tokens=12"]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 MoE modules rewritten" in out and "was already loaded" in out
    words = text(CHAT).split()
    assert words and all(word in out for word in words)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["chat", str(directory), "--quiet"]) == 0, "the end of the input is the end of the conversation"


class Process:
    """A program that serves; ``lines`` grows as it writes."""

    def __init__(self, *argv: str) -> None:
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self.written = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.written:
                self.lines.append(line)
                self.written.notify_all()
        with self.written:
            self.lines.append("")  # the end
            self.written.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        def found() -> re.Match[str] | None:
            match = re.search(pattern, "".join(self.lines))
            if match is None and self.lines and self.lines[-1] == "":
                pytest.fail("".join(self.lines))
            return match

        with self.written:
            match = self.written.wait_for(found, WAIT)
        assert match is not None, "".join(self.lines)
        return match

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()


@pytest.mark.slow
def test_a_plain_checkpoint_is_quantized_in_a_process_of_its_own(
    serving: Any, tmp_path: Path, text: Callable[..., str]
) -> None:
    load(MODEL_DIRECTORY).float().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "mxfp4_compile", "serve", str(tmp_path), "--quantize", "--port", "0", "--json"]
    with Process(*command) as program:
        said = json.loads(program.wait_for(r"(?ms)^\{\n.*?\n\}\n").group())
        assert said["model"] == str(tmp_path) and len(said["report"]["sites"]) == 4
        with client_of(said["url"]) as client:
            assert ask(client, tmp_path, PROMPT).choices[0].text == text(PROMPT)
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(WAIT) == 143
        program.wait_for("mxfp4-compile: terminated\n")


@pytest.mark.slow
def test_transformers_alone_serves_what_was_saved(serving: Any, directory: Path) -> None:
    """Its own ``transformers serve``, with the package compressed-tensors: the experts are dequantized there."""
    pytest.importorskip("compressed_tensors")
    stock = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    command = [sys.executable, "-c", stock, "serve", str(directory), "--host", "127.0.0.1", "--port", "0"]
    with Process(*command, "--device", "cpu") as program:
        url = program.wait_for(r"running on (http://127\.0\.0\.1:\d+)").group(1) + "/v1"
        with client_of(url) as client:
            done = ask(client, directory, PROMPT)
        assert done.usage.completion_tokens == 12 and done.choices[0].text.isprintable()
        assert "MISSING" not in "".join(program.lines) and "newly initialized" not in "".join(program.lines)
