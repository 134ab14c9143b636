"""Limits on the demo's requests: they are bounded, served in a fair order, and only while a client waits.

gradio bounds its queue as a whole (`max_size`) and refuses direct calls (`api_open=False`), but has no public API to
bound a single client or to detect that no client reads an answer. Therefore the events of its queue are read.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from gradio.server_messages import ProcessCompletedMessage

QUEUE = "pipeline"  # `concurrency_id` of the events that compute
MAX_BODY = 2**16  # bytes
MAX_PER_SESSION, MAX_PER_ADDRESS = 2, 32  # running or queued requests; people behind one proxy share an address
MAX_SESSION_NAME = 100  # characters; gradio stores it
SECONDS_TO_LISTEN = 5  # between a request and the opening of its stream of answers
NOT_WAITED_FOR = f"No client waited for this answer: open its stream within {SECONDS_TO_LISTEN} seconds of the request."

_CALLS = re.compile(r"/gradio_api/(run|api|call|queue)/([^/]+)/?")
_ENDS = re.compile(r"/gradio_api/(cancel|reset)/?")
_STREAMS = re.compile(r"/gradio_api/(queue/data|call/[^/]+/[^/]+)/?")
_CLOSED = re.compile(r"/gradio_api/(file|proxy|upload|stream/|deep_link)")  # the page neither receives nor sends files


class Gate:
    """ASGI middleware of the demo's server.

    It closes the routes of files, refuses malformed calls and those beyond a client's limit with a message, lets
    clients take turns, and tracks which clients have an open stream of answers.
    """

    def __init__(self, app: Any):
        self.app = app
        self.streams: Counter[str] = Counter()  # open ones, by session
        self.joining = asyncio.Lock()  # the next request is counted when the last one is in the queue

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["gate"] = self
        if scope["method"] == "POST":
            return await self._post(scope, receive, send)
        if _CLOSED.match(scope["path"]):
            return await _refuse(send, 404, "This demo has no such route.")
        if not _STREAMS.fullmatch(scope["path"]):
            return await self.app(scope, receive, send)
        session = _session_of_stream(scope)
        if session is None:
            return await _refuse(send, 404, "There is no such request, or it was already answered.")
        self.streams[session] += 1
        self._take_turns(_queue_of(scope))
        try:
            await self.app(scope, receive, send)
        finally:
            self.streams -= Counter([session])  # removes counts of 0

    async def _post(self, scope: Any, receive: Any, send: Any) -> None:
        body, is_whole = b"", False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            if len(body) <= MAX_BODY:  # the rest of a larger body is read and dropped, so that the answer arrives
                body += message.get("body", b"")
            is_whole = not message.get("more_body", False)
        call = _CALLS.fullmatch(scope["path"])
        if not (call or _ENDS.fullmatch(scope["path"])):
            return await _refuse(send, 404, "This demo has no such route.")
        if len(body) > MAX_BODY:
            return await _refuse(send, 413, f"A request must have at most {MAX_BODY:,} bytes.")
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return messages.pop() if messages else await receive()

        asked, queue = _parsed(body), _queue_of(scope)
        if call is None:
            cancelled = asked.get("session_hash"), asked.get("fn_index")
            for event in (event for job in queue.active_jobs if job for event in job):
                # gradio itself only ends it at the next preview
                event.alive &= (event.session_hash, event.fn._id) != cancelled
            return await self.app(scope, replay, send)
        if problem := _problem(queue.blocks.fns, call[1], call[2], asked):
            return await _refuse(send, 400, problem)
        if call[1] in ("run", "api"):
            return await self.app(scope, replay, send)
        async with self.joining:
            for event in list(queue.event_ids_to_events.values()):
                if not self.is_wanted(event):
                    queue.send_message(event, ProcessCompletedMessage(output={"error": NOT_WAITED_FOR}, success=False))
                    await queue.clean_events(event_id=event._id)
            if problem := _limit_reached(queue, _address(scope), asked.get("session_hash")):
                return await _refuse(send, 429, problem)
            await self.app(scope, replay, send)
            self._take_turns(queue)

    def is_wanted(self, event: Any) -> bool:
        """Whether a client waits for the answer to a request."""
        is_new = time.monotonic() - event.enqueue_time < SECONDS_TO_LISTEN
        return event.alive and (is_new or event.session_hash in self.streams)

    def _take_turns(self, queue: Any) -> None:
        """Sorts waiting requests: those with a listening client first, then by number per client and per address."""
        if QUEUE not in queue.event_queue_per_concurrency_id:
            return
        waiting = queue.event_queue_per_concurrency_id[QUEUE].queue
        running = [event for event in queue.event_ids_to_events.values() if event not in waiting]
        turns: Counter[Any] = Counter()
        turn = {}
        for event in [*running, *waiting]:
            asker, address = _asker(event), _asker(event)[0]
            turn[event] = event.session_hash not in self.streams, turns[asker], turns[address]
            turns.update([asker, address])
        waiting.sort(key=turn.__getitem__)
        queue.broadcast_estimations(QUEUE)


def watch(request: Any) -> Callable[[], bool]:
    """A function for any thread that says whether a client waits for the answer to a `gradio.Request`."""
    scope = request.request.scope
    if "gate" not in scope:  # not served by `launch_demo`
        return lambda: True
    events = _queue_of(scope).event_ids_to_events.values()
    event = next((event for event in events if event.request is request.request), None)
    return lambda: event is not None and scope["gate"].is_wanted(event)


def _problem(functions: dict[int, Any], kind: str, name: str, asked: dict[str, Any]) -> str | None:
    """Why a call is refused, which gradio would answer with a traceback in the log, or queue in vain; `None` if not."""
    index, data, session = asked.get("fn_index"), asked.get("data"), asked.get("session_hash")
    if index is None or kind == "call":
        function = next((function for function in functions.values() if function.api_name == name), None)
    else:
        function = functions.get(index) if type(index) is int else None
    if function is None or function.fn is None or not (function.queue or kind in ("run", "api")):
        return "This demo has no such function."
    if not isinstance(data, list) or len(data) != len(function.inputs):
        return f"This function takes {len(function.inputs)} values, as a list named data."
    if session is not None and not (isinstance(session, str) and len(session) <= MAX_SESSION_NAME):
        return f"A session_hash must be a text of at most {MAX_SESSION_NAME} characters."
    return None


def _limit_reached(queue: Any, address: str, session: str | None) -> str | None:
    askers = [_asker(event) for event in queue.event_ids_to_events.values()]
    if session is not None and askers.count((address, session)) >= MAX_PER_SESSION:
        return f"You have {MAX_PER_SESSION} running requests; wait for one of them or cancel it."
    if [where for where, _ in askers].count(address) >= MAX_PER_ADDRESS:
        return f"{MAX_PER_ADDRESS} requests from your address are running; try again when some have finished."
    return None


def _asker(event: Any) -> tuple[str, str | None]:
    """Address and session of an event; gradio gives a request without a session its own id."""
    return _address(event.request.scope), None if event.session_hash == event._id else event.session_hash


def _address(scope: Any) -> str:
    return (scope.get("client") or ("",))[0]


def _queue_of(scope: Any) -> Any:
    return scope["app"].get_blocks()._queue


def _session_of_stream(scope: Any) -> str | None:
    """The session of a stream of answers; `None` if no answer is pending."""
    queue, path = _queue_of(scope), scope["path"].rstrip("/")
    pending, event = queue.pending_event_ids_session, path.rpartition("/")[2]
    if path.endswith("/queue/data"):
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
    else:
        session = next((one for one, events in pending.items() if event in events), "")
    return session if session in queue.pending_messages_per_session and pending.get(session) else None


def _parsed(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object; empty for anything else, which gradio refuses."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return asked if isinstance(asked, dict) else {}


async def _refuse(send: Any, status: int, detail: str) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})
