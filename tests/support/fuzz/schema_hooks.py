"""Hooks of schemathesis: requests that reach the engine (the right model name) and end soon."""

import schemathesis

MOST = {"max_tokens": 16, "max_completion_tokens": 16, "max_output_tokens": 16, "n": 2}


@schemathesis.hook
def map_body(context, body):
    """Every second body as generated would name a model that is not served."""
    if isinstance(body, dict):
        if isinstance(body.get("model"), str) or "model" not in body:
            body["model"] = "tiny"
        for name, most in MOST.items():
            if isinstance(body.get(name), int) and body[name] > most:
                body[name] = most
    return body
