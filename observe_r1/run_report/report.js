"use strict";
// Shows the values of a chart where the pointer is. Without this script the page lacks nothing else.
for (const plot of document.querySelectorAll(".plot")) {
  const { plane, curves } = JSON.parse(plot.querySelector("script").textContent);
  const [first, last, left, right, top, bottom, width] = plane;
  const pointer = document.createElement("div");
  const values = document.createElement("div");
  pointer.className = "pointer";
  values.className = "values";
  pointer.hidden = values.hidden = true;
  plot.append(pointer, values);
  const nearest = (steps, step) => {
    let best = 0;
    for (let place = 1; place < steps.length; place++) {
      if (Math.abs(steps[place] - step) < Math.abs(steps[best] - step)) best = place;
    }
    return best;
  };
  const hide = () => { pointer.hidden = values.hidden = true; };
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const scale = box.width / width;
    const step = first + ((event.clientX - box.left) / scale - left) / (right - left) * (last - first);
    if (step < first || step > last) return hide();
    let at = null;
    const lines = [];
    for (const [name, steps, numbers] of curves) {
      const place = nearest(steps, step);
      if (at === null || Math.abs(steps[place] - step) < Math.abs(at - step)) at = steps[place];
      lines.push([steps[place], `${name}: ${numbers[place]}`]);
    }
    values.replaceChildren();
    const head = document.createElement("b");
    head.textContent = `step ${at}`;
    values.append(head);
    for (const [where, text] of lines) {
      const line = document.createElement("div");
      line.textContent = where === at ? text : `${text} (step ${where})`;
      values.append(line);
    }
    pointer.hidden = values.hidden = false;
    const x = (left + (at - first) / (last - first) * (right - left)) * scale;
    Object.assign(pointer.style, { left: `${x}px`, top: `${top * scale}px`, height: `${(bottom - top) * scale}px` });
    const inside = Math.max(0, Math.min(x + 8, box.width - values.offsetWidth));
    values.style.left = `${x + 8 + values.offsetWidth > box.width ? Math.max(0, x - 8 - values.offsetWidth) : inside}px`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}
