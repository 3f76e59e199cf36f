"""Opens a page in Qt's Chromium, in a process of its own, and prints as JSON what it found there.

python browser.py PAGE light|dark WIDTH...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PAGE, SCHEME, *WIDTHS = sys.argv[1:]
os.environ["QT_QPA_PLATFORM"] = "offscreen"
dark = " --blink-settings=preferredColorScheme=0" if SCHEME == "dark" else ""
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu" + dark  # a sandbox needs rights that CI lacks

from PySide6.QtCore import QEventLoop, QTimer, QUrl  # noqa: E402
from PySide6.QtWebEngineCore import (  # noqa: E402
    QWebEnginePage,
    QWebEngineProfile,
    QWebEngineSettings,
    QWebEngineUrlRequestInterceptor,
)
from PySide6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PySide6.QtWidgets import QApplication  # noqa: E402

LOOK = """
(() => {
  const channels = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith("color(srgb") ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a];
  };
  const over = (top, below) => top.slice(0, 3).map((v, n) => v * top[3] + below[n] * (1 - top[3])).concat(1);
  const luminance = (colour) => colour.slice(0, 3)
    .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const paper = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(channels(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const contrasts = [];
  for (const e of document.body.querySelectorAll("*")) {
    if (!e.checkVisibility() || e.closest("svg")) continue;
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const [a, b] = [luminance(over(channels(getComputedStyle(e).color), paper(e))), luminance(paper(e))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    contrasts.push([contrast, e.className + ": " + e.textContent.slice(0, 30)]);
  }
  let shown = null;
  const plot = document.querySelector(".plot");
  if (plot) {
    const box = plot.getBoundingClientRect();
    const at = { clientX: box.left + box.width / 2, clientY: box.top + 20, bubbles: true };
    plot.dispatchEvent(new PointerEvent("pointermove", at));
    shown = plot.querySelector(".values").textContent;
    plot.dispatchEvent(new PointerEvent("pointerleave"));
  }
  for (const details of document.querySelectorAll("details")) details.open = true;
  return JSON.stringify({
    title: document.title,
    hacked: window.hacked === undefined ? null : String(window.hacked),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    sections: [...document.querySelectorAll("section")].map((s) => [s.id, s.offsetHeight]),
    pictures: [...document.images].map((i) => [i.naturalWidth, i.alt, i.src.slice(0, 11)]),
    charts: [...document.querySelectorAll(".plot svg")].map((s) => [s.getBoundingClientRect().height, s.ariaLabel]),
    worst: contrasts.sort((a, b) => a[0] - b[0]).slice(0, 3),
    shown,
    text: document.body.innerText,
  });
})()
"""

console: list[str] = []
requests: list[str] = []


class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        console.append(message)


class Requests(QWebEngineUrlRequestInterceptor):
    def interceptRequest(self, info: Any) -> None:
        address = info.requestUrl().toString()
        if not address.startswith("data:"):
            requests.append(address)


def wait(milliseconds: int) -> None:
    loop = QEventLoop()
    QTimer.singleShot(milliseconds, loop.quit)
    loop.exec()


def evaluate(page: QWebEnginePage, code: str) -> Any:
    loop, found = QEventLoop(), []
    page.runJavaScript(code, 0, lambda value: (found.append(value), loop.quit()))
    loop.exec()
    return found[0]


def main() -> None:
    application = QApplication([])
    profile = QWebEngineProfile(application)
    interceptor = Requests()
    profile.setUrlRequestInterceptor(interceptor)
    view = QWebEngineView()
    page = Page(profile, view)
    page.settings().setAttribute(QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls, True)
    view.setPage(page)
    view.resize(int(WIDTHS[0]), 800)
    view.show()
    loop = QEventLoop()
    page.loadFinished.connect(loop.quit)
    page.load(QUrl.fromLocalFile(str(Path(PAGE).resolve())))
    loop.exec()
    seen = []
    for width in WIDTHS:
        view.resize(int(width), 800)
        while evaluate(page, "innerWidth") != int(width):
            wait(20)
        wait(100)
        seen.append(json.loads(evaluate(page, LOOK)))
    print(json.dumps({"console": console, "requests": requests, "seen": seen}))
    sys.stdout.flush()
    os._exit(0)  # Qt's own end takes seconds


main()
