"""A server of OpenAI's /v1/models and /v1/completions over transformers, for the loop's tests."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, port = sys.argv[1], int(sys.argv[2])
model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)


class Handler(BaseHTTPRequestHandler):
    def reply(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.reply({"object": "list", "data": [{"id": folder, "object": "model"}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/completions"
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == folder
        torch.manual_seed(asked["seed"])
        sampling: dict[str, Any] = {"do_sample": False}
        if asked["temperature"]:
            sampling = dict(do_sample=True, temperature=asked["temperature"], top_k=0)
        choices: list[dict[str, Any]] = []
        for ids in asked["prompt"]:
            rows = torch.tensor([ids] * asked["n"])
            out = model.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows),
                max_new_tokens=asked["max_tokens"], pad_token_id=2, **sampling,
            )  # fmt: skip
            for row in out[:, len(ids) :]:
                text = tokenizer.decode(row, skip_special_tokens=True)
                choices.append({"index": len(choices), "text": text, "finish_reason": "length"})
        self.reply({"id": "1", "object": "text_completion", "created": 0, "model": folder,
                    "choices": choices[::-1]})  # fmt: skip


HTTPServer(("127.0.0.1", port), Handler).serve_forever()
