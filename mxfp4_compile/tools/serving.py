"""A model behind an OpenAI-compatible server: transformers' own, with our experts and our ``generate``.

The endpoints, their fields, streaming and the queue of requests are transformers' (``transformers.cli.serving``), none
of which is patched. Ours is what it is given: a manager that holds one model, loaded by ``load``; a check that a prompt
fits into the context; errors of a stream as JSON; an end to the work for a client that has left.

Needs the extra ``serve``; fastapi and uvicorn are imported where they are used, so that this module can be without.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

from ..checkpoint.loading import load
from ..hf_models import read_config, tokenizer_of
from ..report import Report
from ..runtime import capture

CONTINUOUS_BATCHING = (
    "continuous batching: transformers' own forward over paged caches; the experts are the fused ones, the recorded "
    "steps of generate are not used; temperature, top_p and the like are those of the first request for all that follow"
)
PAGE = 256  # tokens of a page, transformers' default
# Seconds that answers in progress are given when the server is stopped.
GRACE = 5


@dataclass(frozen=True)
class Source:
    """What is served: ``name``, a directory or a hub id, by which clients ask for it too; how it is loaded."""

    name: str
    device: str
    quantize: bool = False
    trust_remote_code: bool = False

    def model(self) -> Any:
        """The model with MXFP4 experts, ready for ``generate``.

        Raises ValueError if its checkpoint is not quantized and ``quantize`` is not set; CheckpointError and
        OptimizeError as ``load`` does.
        """
        config = read_config(self.name, trust_remote_code=self.trust_remote_code)
        if not self.quantize and all(
            getattr(holder, "quantization_config", None) is None
            for holder in (config, config.get_text_config(decoder=True))
        ):
            raise ValueError(
                f"{self.name} is not quantized: --quantize makes its experts MXFP4 while it is read, "
                f"mxfp4-compile optimize {self.name} --out DIR does so once for all"
            )
        model = load(self.name, device_map=self.device, trust_remote_code=self.trust_remote_code)
        return model.eval()

    def processor(self) -> Any:
        """Its processor or tokenizer; ValueError if it has none that transformers' server can stream with."""
        found = None
        if tokenizer_of(self.name, trust_remote_code=self.trust_remote_code) is not None:
            from transformers import AutoProcessor

            found = AutoProcessor.from_pretrained(self.name, trust_remote_code=self.trust_remote_code)
        if found is None:
            raise ValueError(f"{self.name} has no tokenizer: text cannot be served without one")
        if not hasattr(getattr(found, "tokenizer", found), "_tokenizer"):
            raise ValueError(f"{self.name} has a tokenizer without tokenizer.json, which transformers' server needs")
        return found


def paging(model: Any) -> Any:
    """How transformers sizes the pages of continuous batching: by itself on a GPU, by the context on a CPU.

    There it would take nearly all memory of the machine and write to each byte of it, minutes before the first answer.
    """
    from transformers import ContinuousBatchingConfig

    if model.device.type != "cpu":
        return None
    return ContinuousBatchingConfig(num_blocks=max(64, -(-(context_of(model) or 0) // PAGE)), max_batch_tokens=PAGE)


def context_of(model: Any) -> int | None:
    """The most tokens of prompt and answer together that a model was made for; None where it does not say."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def default_device() -> str:
    """The GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class _Manager(ModelManager):  # type: ignore[misc]
    """Holds the one model that is served, under the name that it was given."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.since = int(time.time())
        super().__init__(
            device=source.device, trust_remote_code=source.trust_remote_code, force_model=source.name
        )  # which loads it

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # without a revision: a directory has none

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **options: Any) -> Any:
        """As transformers has it, of the one model."""
        self._check(model_id_and_revision, options)
        return super().load_model_and_processor(model_id_and_revision, *args, **options)

    def load_model_streaming(self, model_id_and_revision: str, **options: Any) -> Any:
        """As transformers has it, of the one model."""
        self._check(model_id_and_revision, options)
        return super().load_model_streaming(model_id_and_revision, **options)

    def _check(self, name: str, options: dict[str, Any]) -> None:
        """Refuse any other model, on the endpoints too that do not ask which one is pinned."""
        if name != self.source.name or options.get("gguf_file") is not None:
            raise _refused(f"Server is pinned to '{self.source.name}'; requested '{name}'.")

    def _load_processor(self, *_: Any, **__: Any) -> Any:
        return self.source.processor()

    def _load_model(self, *_: Any, **__: Any) -> Any:
        return self.source.model()

    def list_models(self, *_: Any) -> list[dict[str, Any]]:
        """What /v1/models says: the model that is served, not the ones in a cache that are not."""
        return [{"id": self.source.name, "object": "model", "created": self.since, "owned_by": "mxfp4_compile"}]

    get_gen_models = list_models  # as transformers before 5.24 calls it


def _refused(why: str) -> Any:
    """The answer to a request that cannot be met as it is: status 400."""
    from fastapi import HTTPException

    return HTTPException(status_code=400, detail=why)


class _State(GenerationState):  # type: ignore[misc]
    """Hands out what generates, with our checks around it."""

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return _Checked(super().get_manager(model_id, use_cb=use_cb), model_id)


class _Checked:
    """What generates, one request after another or in one batch; with a look at each request before and after."""

    def __init__(self, inner: Any, name: str) -> None:
        self.inner, self.name = inner, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.inner, attribute)

    def _room(self) -> int | None:
        """Tokens that all pages of continuous batching hold, if there are pages: a longer request ends its worker."""
        try:
            return int(self.inner.scheduler.cache.num_blocks) * PAGE
        except (AttributeError, RuntimeError):  # one after another, or no request has come yet
            return None

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **more: Any) -> Any:
        fit(self.name, model, inputs, gen_config, self._room())
        return self.inner.generate_streaming(model, processor, inputs, gen_config, **more)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **more: Any
    ) -> Any:
        fit(self.name, model, inputs, gen_config, self._room())
        left = _Left()
        if isinstance(inputs["input_ids"], torch.Tensor):  # one by one, and not in a batch with others
            inputs = {**inputs, "streamer": left}
        work = asyncio.ensure_future(self.inner.generate_non_streaming(model, processor, inputs, gen_config, **more))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:  # the client is gone: nobody else shall wait for its answer
            left.cancelled.set()
            work.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise


def fit(name: str, model: Any, inputs: Mapping[str, Any], gen_config: Any, room: int | None = None) -> None:
    """See that prompt and answer fit into the context of a model: the answer ends where the context does.

    room: tokens that the cache holds, where that is known. Shortens ``gen_config.max_new_tokens`` where need be. Raises
    HTTPException with status 400 for a prompt that leaves no place for an answer, and for an answer of no tokens.
    """
    ids = inputs["input_ids"]
    count = len(ids) if isinstance(ids, list) else int(ids.shape[-1])
    wanted = gen_config.max_new_tokens
    if count == 0:
        raise _refused("The prompt has no tokens.")
    if wanted is not None and wanted < 1:
        raise _refused(f"An answer of {wanted} tokens was asked for; at least 1 is needed.")
    limits = {f"the context of '{name}' has": context_of(model), "the pages of continuous batching hold": room}
    for what, limit in limits.items():
        if limit is None:
            continue
        if count >= limit:
            raise _refused(f"The prompt has {count} tokens; {what} {limit}, one of which at least is for the answer.")
        if wanted is not None:
            gen_config.max_new_tokens = min(gen_config.max_new_tokens, limit - count)


class _Left:
    """A streamer for ``generate`` that ends it when its client has gone."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def put(self, value: Any) -> None:
        if self.cancelled.is_set():
            raise ConnectionAbortedError("the client has gone")

    def end(self) -> None:
        pass


class _NeedsTemplate:
    """A handler of conversations, which a tokenizer without a chat template cannot write down."""

    def _resolve_model(self, body: dict[str, Any]) -> Any:
        name, model, processor = super()._resolve_model(body)  # type: ignore[misc]
        if getattr(processor, "chat_template", None) is None:
            raise _refused(f"The tokenizer of '{name}' has no chat template; /v1/completions works without one.")
        return name, model, processor


class _TellsErrors:
    """A handler whose streams end with an error as OpenAI's API has it, not with JSON that cannot be read."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        response = await super().handle_request(body, request_id)  # type: ignore[misc]
        if hasattr(response, "body_iterator"):
            response.body_iterator = _told(response.body_iterator)
        return response


async def _told(stream: Any) -> AsyncIterator[str]:
    async with contextlib.aclosing(stream):
        async for chunk in stream:
            # What transformers writes last where generate fails; in what a model writes quotes are escaped.
            before, failed, rest = chunk.partition(_FAILED)
            yield before + _event(rest.removesuffix('"}\n\n'), "server_error") if failed else chunk


_FAILED = 'data: {"error": "'


def _event(message: str, kind: str) -> str:
    return f"data: {json.dumps(_error(message, kind))}\n\n"


def _error(message: str, kind: str) -> dict[str, Any]:
    """An error as OpenAI's API has it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class _Completions(_TellsErrors, CompletionHandler):  # type: ignore[misc]
    pass


class _Chat(_TellsErrors, _NeedsTemplate, ChatCompletionHandler):  # type: ignore[misc]
    pass


class _Responses(_NeedsTemplate, ResponseHandler):  # type: ignore[misc]
    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        # Without a word of it OpenAI's API does not stream here; transformers would.
        return await super().handle_request({"stream": False, **body}, request_id)


class _Outermost:
    """ASGI, around transformers' application, until an answer has begun.

    Cancels a request whose client goes; streams do so by themselves. What fails is told to the client, and where to the
    log; the connection stays, which a server would close behind an exception, under a client that uses it again.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        read, gone, begun = asyncio.Event(), False, False

        async def reading() -> Any:
            message = await receive()
            if not message.get("more_body"):
                read.set()
            return message

        async def sending(message: Any) -> None:
            nonlocal begun
            begun = True
            watching.cancel()
            await send(message)

        async def watch() -> None:
            nonlocal gone
            await read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            answering.cancel()

        answering = asyncio.ensure_future(self.app(scope, reading, sending))
        watching = asyncio.ensure_future(watch())
        try:
            await answering
        except asyncio.CancelledError:
            answering.cancel()
            if not gone:
                raise
        except Exception as error:
            if begun:
                raise
            logging.getLogger("uvicorn.error").exception("a request failed")
            await _answer(500, f"{type(error).__name__}: {error}")(scope, receive, send)
        finally:
            watching.cancel()


def _application(manager: _Manager, state: _State) -> Any:
    """transformers' application for one model, with our handlers of requests and of errors."""
    from fastapi import HTTPException
    from jinja2 import TemplateError

    parts = (manager, state)
    handlers: dict[str, Any] = {
        "completion_handler": _Completions(*parts),
        "response_handler": _Responses(*parts),
        "transcription_handler": TranscriptionHandler(*parts),
    }
    if "systemone_handler" in inspect.signature(build_server).parameters:  # not in transformers 5.17
        from transformers.cli.serving.systemone import SystemOneHandler

        handlers["systemone_handler"] = SystemOneHandler(*parts)
    app = build_server(manager, _Chat(*parts), generation_state=state, **handlers)
    app.add_exception_handler(HTTPException, lambda _, e: _answer(e.status_code, str(e.detail)))
    app.add_exception_handler(
        TemplateError, lambda _, e: _answer(400, f"The chat template refuses this conversation: {e}")
    )
    app.add_middleware(_Outermost)
    return app


def _answer(status: int, said: str) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse(_error(said, "invalid_request_error" if status < 500 else "server_error"), status)


def _bound(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet; OSError if the address is taken or not of this machine."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except BaseException:
        found.close()
        raise
    return found


class Server:
    """A model that is loaded and served. ``url`` is where; ``report`` what became of the model.

    host, port: where it listens, port 0 for a free one; taken before the model is loaded, so that a port in use is
    OSError at once, and answered only once it is. continuous_batching: transformers' batches of what several clients
    ask for at once, instead of one request after the other.

    ``run()`` serves until the process is interrupted; as a context manager it serves in a thread.
    """

    def __init__(
        self,
        source: Source,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        continuous_batching: bool = False,
        log_level: str = "info",
    ) -> None:
        import uvicorn

        self._socket = _bound(host, port)
        try:
            self._manager = _Manager(source)
            model = self._manager.load_model_and_processor(source.name)[0]
            self.report: Report = model.mxfp4_report
            self._state = _State(continuous_batching, cb_config=paging(model) if continuous_batching else None)
            if continuous_batching:
                self.report.runtime.note(CONTINUOUS_BATCHING)
            else:  # in the thread in which generate will run
                self._state.get_manager(source.name).submit(capture, model, (1,)).result()
        except BaseException:
            self._socket.close()
            raise
        shown = f"[{host}]" if self._socket.family == socket.AF_INET6 else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}/v1"
        app = _application(self._manager, self._state)
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=GRACE, ws="none")
        )
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until the process gets SIGINT or SIGTERM, which is then raised again."""
        self._socket.listen()
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._end()

    def __enter__(self) -> Server:
        self._socket.listen()  # from here on requests wait for the thread
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._uvicorn.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._end()

    def _end(self) -> None:
        self._state.shutdown()
        self._manager.shutdown()
        self._socket.close()
