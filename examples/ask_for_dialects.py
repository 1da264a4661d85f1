"""Ask a running vLLM server for three dialects by name; it makes the adapters that it does not have yet.

    python examples/ask_for_dialects.py --url http://127.0.0.1:8000/v1
    python examples/ask_for_dialects.py "dialect:Irish English" "dialect:Indian English"

The client is OpenAI's own: an adapter is asked for as a model.
"""

from __future__ import annotations

import argparse
import time

import openai

DIALECTS = ("dialect:Nigerian English", "dialect:Indian English", "dialect:Appalachian English")
PROMPT = "She don't know nothing about them books, because"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=DIALECTS, help="models to ask for")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.url, api_key="none", timeout=600, max_retries=0)
    for name in [*options.names, options.names[0], "dialect:Atlantean"]:
        started = time.perf_counter()
        try:
            answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=16, temperature=0)
            text = answer.choices[0].text
        except openai.APIStatusError as error:
            text = f"[{error.status_code}] {error.body['message'] if isinstance(error.body, dict) else error}"
        print(f"{name} ({time.perf_counter() - started:.2f} s): {text.strip()}")


if __name__ == "__main__":
    main()
