"""Chats with `mini-vlm` through the page of `mmrecipes serve` in headless Chromium, and photographs it: docs/chat.png.

By hand: `pip install playwright`, a Chromium on the PATH, `python tools/chat_page.py`. It fails unless the answers on the page
are those of the exported model, a text with HTML in it stays text, and the browser asked nobody but the server.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

import mmrecipes as mmr
from mmrecipes.data import scenes
from mmrecipes.measure.process import same_packages
from recipes import ROOT

QUESTIONS = ("What colour is the small cross?", "Which shape does the black object have?", "What size is the purple triangle?")
INJECTED = "<img src=x onerror=\"document.title='taken over'\"><script>document.title='taken over'</script>"
KEY = "a key for an afternoon"


def chat(page, address: str, image: Path) -> list[str]:
    """The answers that the page shows, one after another; the picture is taken before the last, which is about INJECTED."""
    page.goto(address)
    page.fill("#key", KEY)
    page.set_input_files("#image", image)
    for i, question in enumerate((*QUESTIONS, INJECTED)):
        if i == len(QUESTIONS):
            page.screenshot(path=ROOT / "docs" / "chat.png", full_page=True)
        page.fill("#text", question)
        page.click("#send")
        page.wait_for_selector(f"#turns p.assistant:nth-of-type({2 * i + 2}) small")
    assert page.locator("#turns .user span").all_text_contents() == [*QUESTIONS, INJECTED]
    assert (page.title(), page.locator("#turns .error").count()) == ("mmrecipes serve", 0)
    return page.locator("#turns .assistant span").all_text_contents()


def expected(exported, image: Image.Image) -> list[str]:
    """What the model says in the same conversation, turn by turn."""
    turns, answers = [], []
    for question in (*QUESTIONS, INJECTED):
        content = [{"type": "image"}] * (not turns) + [{"type": "text", "text": question}]
        turns.append({"role": "user", "content": content})
        answers.append(exported.generate(image, turns))
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
    return answers


def main() -> None:
    from playwright.sync_api import sync_playwright

    image, asked = scenes.render(scenes.make_scene(mmr.data.SPLITS["validation"][5001])), []
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "scene.png"
        image.save(picture)
        out = mmr.export.export(mmr.load("mini-vlm"), Path(folder) / "mini-vlm", "onnx", "int8", batches=True)
        command = [sys.executable, "-m", "mmrecipes.cli", "serve", str(out), "--port", "0", "--api-key-env", "CHAT_KEY"]
        env = same_packages() | {"CHAT_KEY": KEY}
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as browsers:
            address = server.stdout.readline().split()[-1]
            browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 760, "height": 500})
            page.on("request", lambda request: asked.append(request.url))
            found = chat(page, address, picture)
            browser.close()
            server.terminate()
        wanted = expected(mmr.load_exported(out), Image.open(io.BytesIO(picture.read_bytes())))
    assert found == wanted, (found, wanted)
    assert all(url.startswith((address, "data:")) for url in asked), asked
    print(*zip(QUESTIONS, found, strict=False), sep="\n")
    print(f"{len(asked)} requests, docs/chat.png {(ROOT / 'docs' / 'chat.png').stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
