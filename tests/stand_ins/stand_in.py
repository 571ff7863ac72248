#!/usr/bin/env python3
"""A stand-in for the models behind real coding CLIs, on 127.0.0.1, scripted by the prompt. Standard library only.

    python tests/stand_ins/stand_in.py --port 0 --log requests.jsonl --ttl 600      (the first line printed is its address)

It speaks the Anthropic Messages API (Claude Code), the Responses API (Codex), chat completions (opencode, aider) and the
Gemini API. It keeps no conversation: each reply is made from the request alone. The script is the last human prompt that holds
a directive, one a line (blanks, `-`, `*`, `>` before it are ignored, and so is every other line):

    WRITE path::text        the CLI's own tool for writing a file, or a shell line; `\\n` in text is a line's end
    APPEND path::text       a shell line that appends
    RUN command             a shell line
    COMMIT message          git add -A && git commit; comes by itself at the end after a WRITE, unless NOCOMMIT is there
    READ path, ASK question, TOOL name::{json}   the tools of Claude Code by that name
    SLEEP seconds           think so long before the next reply
    ERROR status[::times[::message]]    answer with this HTTP error first, `times` times for this prompt
    LIMIT seconds           a usage limit for everybody that ends after so many seconds; `LIMIT minute`: when this minute does
    GATHER count            wait until so many conversations have come to this directive, 90 seconds at most
    SUBMIT, FAIL why        the last `farm submit ...`, `farm fail ...` that the conversation was told to run, exactly as it says
    AWAIT                   wait until somebody has come to a LIMIT, 90 seconds at most
    DROP                    close the connection in the middle of a reply, once
    SAY text                what the last reply says

`FIRST` before a directive: only where the prompt says attempt 1; `AGAIN`: only in a later one.
A prompt without directives is answered with "OK: <its start>". GET /_stats tells what was asked so far.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from stand_in_script import Model, parse_script, parts_of, shell_line, text_of

CWD = re.compile(r"(?:Primary working directory|Working directory|cwd)\s*:\s*(\S+)", re.IGNORECASE)
ERROR_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}
GEMINI_ROUTE = json.dumps(
    {"reasoning": "x", "model_choice": "flash", "next_speaker": "user", "complexity_reasoning": "x", "complexity_score": 1}
)
USAGE = {"input": 1200, "output": 80}


# ---------------------------------------------------------------------------------------------- one protocol after the other


def find_cwd(body: dict) -> str:
    """The CLI names its working directory in the system prompt or in its first messages."""
    texts = [text_of(body.get("system"))] + [
        part.get("text") or "" for message in (body.get("messages") or [])[:3] for part in parts_of(message.get("content"))
    ]
    found = next(filter(None, map(CWD.search, texts)), None)
    return found.group(1).rstrip(".,;`'\"") if found and found.group(1).startswith("/") else ""


def fill(schema: dict):
    """The smallest value that a JSON schema accepts: well enough for a CLI's side calls (titles)."""
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object" or "properties" in schema:
        return {key: fill(value) for key, value in (schema.get("properties") or {}).items()}
    if schema.get("enum"):
        return schema["enum"][0]
    return {"array": [], "boolean": False, "integer": 0, "number": 0, "null": None}.get(kind, "A session")


def claude_tool(reply: dict, tools: set[str], cwd: str) -> dict:
    """The tool_use block of Claude Code for one directive."""
    word, argument = reply["word"], reply["argument"]
    path, _, text = argument.partition("::")
    absolute = os.path.join(cwd, path.strip())
    name, given = "Bash", {"command": shell_line(word, argument), "description": f"{word.lower()} step"}
    if word == "WRITE" and "Write" in tools:
        name, given = "Write", {"file_path": absolute, "content": text.replace("\\n", "\n")}
    elif word == "READ":
        name, given = "Read", {"file_path": absolute}
    elif word == "TOOL":
        name, given = path.strip(), json.loads(text or "{}")
    elif word == "ASK":
        options = [{"label": label, "description": f"take the {label.lower()}"} for label in ("First", "Second")]
        name, given = (
            "AskUserQuestion",
            {"questions": [{"question": argument or "Which one?", "header": "Choice", "multiSelect": False, "options": options}]},
        )
    return {"type": "tool_use", "id": "toolu_" + uuid.uuid4().hex[:24], "name": name, "input": given}


def claude_items(body: dict) -> list[tuple[str, str, int]]:
    items = []
    for message in body.get("messages") or []:
        results = sum(part.get("type") == "tool_result" for part in parts_of(message.get("content")))
        texts = [part for part in parts_of(message.get("content")) if part.get("type") == "text"]
        items.append((message.get("role", ""), text_of(texts), results))
    return items


def claude_message(model: str, content: list[dict], stop_reason: str) -> dict:
    usage = {"input_tokens": USAGE["input"], "output_tokens": USAGE["output"]}
    usage |= {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    message = {"id": "msg_" + uuid.uuid4().hex[:24], "type": "message", "role": "assistant", "model": model, "content": content}
    return {**message, "stop_reason": stop_reason, "stop_sequence": None, "usage": usage}


def claude_events(message: dict) -> list[dict]:
    """The same message as a stream."""
    started = {**message, "content": [], "stop_reason": None, "usage": {**message["usage"], "output_tokens": 1}}
    events = [{"type": "message_start", "message": started}]
    for index, block in enumerate(message["content"]):
        if block["type"] == "text":
            empty, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            empty, delta = {**block, "input": {}}, {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        events.append({"type": "content_block_start", "index": index, "content_block": empty})
        events.append({"type": "content_block_delta", "index": index, "delta": delta})
        events.append({"type": "content_block_stop", "index": index})
    end = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    events.append({"type": "message_delta", "delta": end, "usage": {"output_tokens": USAGE["output"]}})
    return [*events, {"type": "message_stop"}]


def codex_items(body: dict) -> list[tuple[str, str, int]]:
    items = []
    for item in body.get("input") or []:
        text = text_of(item.get("content")) if item.get("type", "message") == "message" else ""
        items.append((item.get("role") or "", text, int(str(item.get("type")).endswith("call_output"))))
    return items


def codex_text(text: str) -> dict:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": content}


def codex_call(reply: dict, tools: set[str]) -> dict:
    """A call of whichever shell tool this version offers."""
    line = shell_line(reply["word"], reply["argument"])
    given = {"exec_command": {"cmd": line}, "shell_command": {"command": line}, "shell": {"command": ["bash", "-lc", line]}}
    name = next((name for name in given if name in tools), "exec_command")
    ids = {"id": "fc_" + uuid.uuid4().hex, "call_id": "call_" + uuid.uuid4().hex}
    return {"type": "function_call", **ids, "name": name, "arguments": json.dumps(given[name]), "status": "completed"}


def chat_message(reply: dict, tools: set[str]) -> dict:
    """A call of the shell tool, or text; for a CLI without tools (aider), the files of the script as blocks."""
    if reply["word"] and tools:
        name = next((name for name in ("bash", "shell", "run_shell_command") if name in tools), "bash")
        given = json.dumps({"command": shell_line(reply["word"], reply["argument"]), "description": "step"})
        call = {
            "index": 0,
            "id": "call_" + uuid.uuid4().hex[:20],
            "type": "function",
            "function": {"name": name, "arguments": given},
        }
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    blocks = [f"{path.strip()}\n```\n{text}\n```" for path, text in written_files(reply["prompt"])]
    return {"role": "assistant", "content": reply["text"] if tools else "\n".join(blocks) or "A session"}


def gemini_items(body: dict) -> list[tuple[str, str, int]]:
    items = []
    for content in body.get("contents") or []:
        parts = content.get("parts") or []
        items.append((content.get("role") or "user", text_of(parts), sum("functionResponse" in part for part in parts)))
    return items


def written_files(prompt: str) -> list[tuple[str, str]]:
    files = [argument.partition("::") for word, argument, _ in parse_script(prompt)[0] if word == "WRITE"]
    return [(path, text.replace("\\n", "\n")) for path, _, text in files]


class Handler(BaseHTTPRequestHandler):
    """One request: read it, ask the model, answer in the caller's protocol."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_args) -> None:
        """The server writes its own log."""

    def send_json(self, status: int, value, headers: dict | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_events(self, events: list, *, named: bool, drop: bool = False) -> None:
        """Server-sent events; with `drop` the connection is closed after half of them."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for event in events[: len(events) // 2] if drop else events:
            head = f"event: {event['type']}\n" if named else ""
            self.wfile.write(f"{head}data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
            self.wfile.flush()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.note(self.command, path)
        if path == "/_stats":
            return self.send_json(200, self.server.stats())
        if path.endswith("/models"):
            models = [
                {"type": "model", "object": "model", "id": name, "display_name": name} for name in ("claude-sonnet-4-5", "fake")
            ]
            return self.send_json(200, {"object": "list", "data": models, "models": [], "has_more": False})
        return self.send_json(200 if path == "/" else 404, {"ok": path == "/"})

    def do_POST(self) -> None:
        path = self.path.split("?")[0]
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        try:
            body = json.loads(raw or b"{}")
        except ValueError:
            body = {}
        routes = {"/v1/messages": self.answer_claude, "/v1/responses": self.answer_codex, "/v1/chat/completions": self.answer_chat}
        answer = routes.get(path) or (self.answer_gemini if "enerateContent" in path else None)
        if path.endswith("/count_tokens"):
            return self.send_json(200, {"input_tokens": max(1, len(raw) // 4)})
        if answer is None:
            self.server.note("POST", path)
            return self.send_json(404, {"error": {"message": "no such path"}})
        try:
            return answer(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def ask(self, items: list[tuple[str, str, int]], session: str, **fields) -> dict:
        """The model's reply, noted in the log with the prompts that it could see."""
        known = self.headers.get("authorization") or self.headers.get("x-api-key") or self.headers.get("x-goog-api-key") or ""
        if "invalid" in known:
            reply = {"refusal": (401, "invalid x-api-key", 0), "word": "", "argument": "", "text": "", "drop": False, "prompt": ""}
        else:
            reply = self.server.model.reply(items, session)
        prompts = [text[:200] for role, text, _ in items if role == "user" and text]
        self.server.note(
            "POST",
            self.path.split("?")[0],
            session=session,
            messages=len(items),
            prompts=prompts[-6:],
            status=reply["refusal"][0] if reply["refusal"] else 200,
            word=reply["word"],
            argument=reply["argument"][:60],
            **fields,
        )
        return reply

    # -- Claude Code

    def answer_claude(self, body: dict) -> None:
        tools = {tool.get("name") for tool in body.get("tools") or []}
        schema = (body.get("output_config") or {}).get("format") or body.get("output_format") or {}
        session = self.headers.get("x-claude-code-session-id") or ""
        if schema.get("type") == "json_schema" or not tools:
            text = json.dumps(fill(schema.get("schema") or {})) if schema else "A session"
            self.server.note("POST", "/v1/messages", session=session, side=True)
            return self.send_claude(body, [{"type": "text", "text": text}], "end_turn")
        reply = self.ask(claude_items(body), session, model=body.get("model"))
        if reply["refusal"]:
            return self.refuse_claude(*reply["refusal"])
        content = [{"type": "text", "text": reply["text"]}]
        if reply["word"]:
            content = [{"type": "text", "text": f"Step: {reply['word'].lower()}"}, claude_tool(reply, tools, find_cwd(body))]
        return self.send_claude(body, content, "tool_use" if reply["word"] else "end_turn", drop=reply["drop"])

    def refuse_claude(self, status: int, message: str, reset: float) -> None:
        headers = {"retry-after": "1"} if status in (429, 529) else {}
        if reset:
            unified = {
                "status": "rejected",
                "reset": int(reset),
                "representative-claim": "five_hour",
                "5h-status": "rejected",
                "5h-reset": int(reset),
                "5h-utilization": "1.0",
                "fallback": "unavailable",
                "overage-status": "rejected",
                "overage-disabled-reason": "org_level_disabled",
            }
            headers = {
                "retry-after": str(max(1, int(reset - time.time()))),
                "x-should-retry": "false",
                **{f"anthropic-ratelimit-unified-{key}": str(value) for key, value in unified.items()},
            }
        self.send_json(
            status, {"type": "error", "error": {"type": ERROR_KINDS.get(status, "api_error"), "message": message}}, headers
        )

    def send_claude(self, body: dict, content: list[dict], stop_reason: str, *, drop: bool = False) -> None:
        message = claude_message(body.get("model") or "fake", content, stop_reason)
        if not body.get("stream"):
            return self.send_json(200, message)
        return self.send_events(claude_events(message), named=True, drop=drop)

    # -- Codex

    def answer_codex(self, body: dict) -> None:
        tools = {tool.get("name") or tool.get("type") for tool in body.get("tools") or []}
        reply = self.ask(codex_items(body), str(body.get("prompt_cache_key") or ""), model=body.get("model"))
        if reply["refusal"]:
            return self.refuse_openai(*reply["refusal"])
        item = codex_call(reply, tools) if reply["word"] else codex_text(reply["text"])
        usage = {"input_tokens": USAGE["input"], "output_tokens": USAGE["output"], "total_tokens": sum(USAGE.values())}
        base = {"id": "resp_" + uuid.uuid4().hex, "object": "response", "model": body.get("model")}
        events = [
            {"type": "response.created", "response": dict(base, status="in_progress", output=[], usage=None)},
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": dict(base, status="completed", output=[item], usage=usage)},
        ]
        return self.send_events(events, named=True, drop=reply["drop"])

    def refuse_openai(self, status: int, message: str, reset: float) -> None:
        error = {"message": message, "type": "invalid_request_error" if status < 429 else "server_error", "code": None}
        if reset:
            error = {
                "message": "The usage limit has been reached",
                "type": "usage_limit_reached",
                "plan_type": "plus",
                "resets_at": int(reset),
                "resets_in_seconds": max(1, int(reset - time.time())),
            }
        self.send_json(status, {"error": error})

    # -- opencode, aider

    def answer_chat(self, body: dict) -> None:
        tools = {tool["function"]["name"] for tool in body.get("tools") or []}
        items = [
            (message.get("role") or "", text_of(message.get("content")), int(message.get("role") == "tool"))
            for message in body.get("messages") or []
        ]
        reply = self.ask(items, "", model=body.get("model"), tools=len(tools))
        if reply["refusal"]:
            return self.refuse_openai(*reply["refusal"])
        message = chat_message(reply, tools)
        finish = "tool_calls" if message.get("tool_calls") else "stop"
        usage = {"prompt_tokens": USAGE["input"], "completion_tokens": USAGE["output"], "total_tokens": sum(USAGE.values())}
        base = {"id": "chat-" + uuid.uuid4().hex, "created": int(time.time()), "model": body.get("model")}
        if not body.get("stream"):
            choices = [{"index": 0, "message": message, "finish_reason": finish}]
            return self.send_json(200, {**base, "object": "chat.completion", "choices": choices, "usage": usage})
        base["object"] = "chat.completion.chunk"
        first = {**base, "choices": [{"index": 0, "delta": message, "finish_reason": None}]}
        last = {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}], "usage": usage}
        return self.send_events([first, last, "[DONE]"], named=False, drop=reply["drop"])

    # -- Gemini CLI

    def answer_gemini(self, body: dict) -> None:
        tools = {item["name"] for tool in body.get("tools") or [] for item in tool.get("functionDeclarations") or []}
        reply = self.ask(gemini_items(body), "", tools=len(tools))
        if reply["refusal"]:
            return self.refuse_gemini(*reply["refusal"])
        part = {"text": reply["text"]}
        if (body.get("generationConfig") or {}).get("responseMimeType") == "application/json":
            part = {"text": GEMINI_ROUTE}
        elif reply["word"] and tools:
            given = {"command": shell_line(reply["word"], reply["argument"]), "description": "step"}
            part = {"functionCall": {"name": "run_shell_command", "args": given}}
        counts = zip(
            ("promptTokenCount", "candidatesTokenCount", "totalTokenCount"), (*USAGE.values(), sum(USAGE.values())), strict=True
        )
        response = {
            "candidates": [{"content": {"role": "model", "parts": [part]}, "finishReason": "STOP", "index": 0}],
            "modelVersion": "fake",
            "usageMetadata": dict(counts),
        }
        return self.send_events([response], named=False) if "stream" in self.path else self.send_json(200, response)

    def refuse_gemini(self, status: int, message: str, reset: float) -> None:
        names = {
            400: "INVALID_ARGUMENT",
            401: "UNAUTHENTICATED",
            403: "PERMISSION_DENIED",
            429: "RESOURCE_EXHAUSTED",
            503: "UNAVAILABLE",
        }
        error = {"code": status, "message": message, "status": names.get(status, "INTERNAL")}
        if reset:
            seconds = max(1, int(reset - time.time()))
            error["message"] = (
                f"You exceeded your current quota, please check your plan and billing details. Please retry in {seconds}s."
            )
            error["details"] = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{seconds}s"}]
        self.send_json(status, {"error": error})


# ---------------------------------------------------------------------------------------------- the server


class StandIn(ThreadingHTTPServer):
    """Listens on 127.0.0.1 only; `log` is a path for one JSON line a request, or None."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int = 0, log: str | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.lock, self.counts = Model(), threading.Lock(), {}
        self.log = open(log, "a", buffering=1, encoding="utf-8") if log else None  # noqa: SIM115  open as long as the server is
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, ValueError, OSError)):
            super().handle_error(request, client_address)

    def note(self, method: str, path: str, **fields) -> None:
        with self.lock:
            self.counts[f"{method} {path}"] = self.counts.get(f"{method} {path}", 0) + 1
            if self.log:
                self.log.write(json.dumps({"at": round(time.time(), 3), "method": method, "path": path, **fields}) + "\n")

    def stats(self) -> dict:
        with self.lock:
            return {"requests": sum(self.counts.values()), "by_path": dict(self.counts)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--log", help="a file for one JSON line a request")
    parser.add_argument("--ttl", type=float, default=3600, help="seconds until it ends by itself")
    options = parser.parse_args()
    server = StandIn(options.port, options.log)
    timer = threading.Timer(options.ttl, server.shutdown)
    timer.daemon = True
    timer.start()
    print(server.url, flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
