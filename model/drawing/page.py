"""A web page that plays a clip with what an answer says of it: one file, which needs nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..answer import Answer
from ..geometry import Box, Instant, Tube
from ..video import Video
from .pictures import Mark, Shot, box_at, drawing_size, marks, shots, write_video

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
body { font: 16px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem; color: #222; }
#stage { position: relative; line-height: 0; background: #000; }
#media { width: 100%; }
#overlay { position: absolute; left: 0; top: 0; pointer-events: none; }
#rows { position: relative; margin: 1rem 0; }
.row { cursor: pointer; padding-bottom: .4rem; font-size: .9rem; }
.track { position: relative; height: .8rem; background: #eee; }
.bar { position: absolute; top: 0; height: 100%; min-width: 3px; }
#cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: #c00; z-index: 1; }
blockquote { margin: .5rem 0; padding-left: .8rem; border-left: 3px solid #ccc; white-space: pre-wrap; }
blockquote, .problem { overflow-wrap: anywhere; }
.problem { color: #a40000; }
</style>
</head>
<body>
<blockquote>@PROMPT@</blockquote>
<div id="stage">@MEDIA@<canvas id="overlay"></canvas></div>
<div id="rows"><div id="cursor"></div></div>
<p id="answer" style="white-space: pre-wrap; overflow-wrap: anywhere">@ANSWER@</p>
@PROBLEMS@
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const media = document.getElementById("media"), overlay = document.getElementById("overlay");
const rows = document.getElementById("rows"), cursor = document.getElementById("cursor");
const isVideo = media.tagName === "VIDEO";

// The frame that is displayed at a time: the last that begins no later.
function frameAt(time) {
  let low = 0, high = data.times.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (data.times[middle] <= time + 1e-3) low = middle; else high = middle;
  }
  return low;
}

function draw(time) {
  const width = media.clientWidth, height = media.clientHeight, scale = window.devicePixelRatio || 1;
  overlay.width = width * scale;
  overlay.height = height * scale;
  overlay.style.width = width + "px";
  overlay.style.height = height + "px";
  const context = overlay.getContext("2d");
  context.scale(scale, scale);
  context.lineWidth = 3;
  context.font = "14px system-ui, sans-serif";
  context.textBaseline = "top";
  const frame = frameAt(time);
  for (const mark of data.marks) {
    const box = mark.boxes[frame - mark.first];
    if (!box) continue;
    const x = box[0] * width, y = box[1] * height;
    context.strokeStyle = context.fillStyle = mark.colour;
    context.strokeRect(x, y, (box[2] - box[0]) * width, (box[3] - box[1]) * height);
    const length = context.measureText(mark.label).width + 8;
    const left = Math.max(0, Math.min(x, width - length)), top = Math.max(0, y - 20);
    context.fillRect(left, top, length, 20);
    context.fillStyle = mark.ink;
    context.fillText(mark.label, left + 4, top + 3);
  }
  cursor.style.left = 100 * time / data.duration + "%";
}

for (const mark of data.marks) {
  if (mark.start === null) continue;
  const [row, name, track, bar] = ["row", "name", "track", "bar"].map((kind) => {
    const element = document.createElement("div");
    element.className = kind;
    return element;
  });
  bar.style.left = 100 * mark.start / data.duration + "%";
  bar.style.width = 100 * (mark.end - mark.start) / data.duration + "%";
  bar.style.background = mark.colour;
  const end = mark.end > mark.start ? " to " + mark.end.toFixed(2) : "";
  name.textContent = mark.label + ": " + mark.start.toFixed(2) + end + " s";
  track.append(bar);
  row.append(name, track);
  row.addEventListener("click", () => { media.currentTime = mark.start; });
  rows.append(row);
}
if (isVideo) {
  const now = () => draw(media.currentTime);
  for (const event of ["loadeddata", "seeked", "timeupdate"]) media.addEventListener(event, now);
  window.addEventListener("resize", now);
  if (media.requestVideoFrameCallback) {
    const step = (_, frame) => { draw(frame.mediaTime); media.requestVideoFrameCallback(step); };
    media.requestVideoFrameCallback(step);
  } else {
    const step = () => { now(); requestAnimationFrame(step); };
    requestAnimationFrame(step);
  }
} else {
  rows.style.display = "none";
  for (const event of ["load", "resize"]) window.addEventListener(event, () => draw(0));
}
</script>
</body>
</html>
"""


def write_video_page(
    answer: Answer, source: Video, path: str | PathLike[str], prompt: str = "", fps: float | None = None
) -> None:
    """Writes the page of a video.

    Args:
        answer: in seconds and pixels of the video.
        source: as for `load_video`. What is embedded is encoded anew, at most 1,280 pixels wide and high.
        path: of the page.
        prompt: what was asked.
        fps: as for `load_video`.
    """
    found = marks(answer)
    tracks: list[list[list[float] | None]] = [[] for _ in found]
    times, end = [], 0.0

    def watched() -> Iterator[Shot]:
        nonlocal end
        for shot in shots(source, fps):
            times.append(shot.start)
            end = shot.end
            for track, mark in zip(tracks, found, strict=True):
                track.append(_fractions(box_at(mark.item, shot.start, shot.end), shot.size))
            yield shot

    clip = io.BytesIO()
    write_video(watched(), clip)
    element = f'<video id="media" controls loop muted playsinline src="{_embed(clip, "video/mp4")}"></video>'
    _write(path, answer, prompt, element, _data(found, tracks, times, end))


def write_image_page(answer: Answer, picture: np.ndarray, path: str | PathLike[str], prompt: str = "") -> None:
    """Writes the page of an image, uint8 RGB `[H, W, 3]`; `answer` is in its pixels."""
    height, width = picture.shape[:2]
    file = io.BytesIO()
    size = drawing_size(width, height)
    Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    found = [mark for mark in marks(answer) if isinstance(mark.item, Box)]
    tracks = [[_fractions(box_at(mark.item, 0.0, math.inf), (width, height))] for mark in found]
    element = f'<img id="media" alt="" src="{_embed(file, "image/jpeg")}">'
    _write(path, answer, prompt, element, _data(found, tracks, [0.0], 1.0))


def _fractions(box: Box | None, size: tuple[int, int]) -> list[float] | None:
    if box is None:
        return None
    width, height = size
    return [round(x, 4) for x in (box.left / width, box.top / height, box.right / width, box.bottom / height)]


def _embed(file: io.BytesIO, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _data(
    found: list[Mark], tracks: list[list[list[float] | None]], times: list[float], duration: float
) -> dict[str, Any]:
    entries = []
    for mark, track in zip(found, tracks, strict=True):
        shown = [i for i, box in enumerate(track) if box is not None]
        first, last = (shown[0], shown[-1] + 1) if shown else (0, 0)
        start, end = _times(mark)
        entry = {"label": mark.label, "colour": mark.colour, "ink": mark.ink, "start": start, "end": end}
        entries.append({**entry, "first": first, "boxes": track[first:last]})
    return {"marks": entries, "times": [round(time, 6) for time in times], "duration": max(duration, 1e-3)}


def _times(mark: Mark) -> tuple[float, float] | tuple[None, None]:
    if isinstance(mark.item, Box):
        return None, None
    if isinstance(mark.item, Instant):
        return mark.item.time, mark.item.time
    span = mark.item.span if isinstance(mark.item, Tube) else mark.item
    return min(span.start, span.end), max(span.start, span.end)


def _write(path: str | PathLike[str], answer: Answer, prompt: str, media: str, data: dict[str, Any]) -> None:
    problems = "".join(f'<p class="problem">{html.escape(problem)}</p>' for problem in answer.problems)
    # "<" would let a text end the script element; JSON can do without it.
    script = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    values = {
        "TITLE": html.escape(prompt[:80] or "LLaVA-ST"),
        "PROMPT": html.escape(prompt),
        "MEDIA": media,
        "ANSWER": html.escape(answer.text),
        "PROBLEMS": problems,
        "DATA": script,
    }
    # In one pass, so that a text with "@DATA@" in it stays what it is.
    page = re.sub("@([A-Z]+)@", lambda match: values[match[1]], _TEMPLATE)
    Path(path).write_text(page, encoding="utf-8")
