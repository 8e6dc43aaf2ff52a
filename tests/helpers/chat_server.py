"""A server of OpenAI's chat completions in a process of its own: python -m tests.helpers.chat_server PORT LOG [SECONDS]

Its only model is "echo". It answers a question with the question, is busy (429) or fails (503) at the first request for
some of them, takes a minute for "slow" and half a second for "late", and appends every question that it answers to the
file LOG. It refuses those that say "too long", after the questions named in them ("too long;first;second") were asked.
"""

import http.server
import json
import sys
import time


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked: set[str] = set()
    log, seconds = "", 0.0

    def reply(self, status, value, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path != "/v1/models":
            return self.reply(404, {"error": {"message": "nothing here"}})
        if self.headers["Authorization"] == "Bearer wrong":
            return self.reply(401, {"error": {"message": "wrong key"}})
        self.reply(200, {"object": "list", "data": [{"id": "echo", "object": "model", "created": 0, "owned_by": ""}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (message,) = request["messages"]
        question = message["content"]
        if "too long" in question:
            while not self.asked.issuperset(question.split(";")[1:]):
                time.sleep(0.01)
            return self.reply(400, {"error": {"message": "the prompt has 9999 tokens, 100 are possible"}})
        first = question not in self.asked
        self.asked.add(question)
        if first and len(question) % 3 == 0:
            return self.reply(429 if len(question) % 2 else 503, {"error": {"message": "busy"}}, Retry_After="0.01")
        time.sleep(60 if "slow" in question else 0.5 if "late" in question else self.seconds)
        words = question.split()
        answer = " ".join(words[: request["max_tokens"]])
        if request["temperature"]:
            answer += f" {request['seed']}"
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(question + "\n")
        finish = "length" if len(words) > request["max_tokens"] else "stop"
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": f" {answer}\ud800\n"},
            "finish_reason": finish,
        }
        completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "echo", "choices": [choice]}
        self.reply(200, completion)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    Handler.log, Handler.seconds = sys.argv[2], float([*sys.argv, "0"][3])
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
