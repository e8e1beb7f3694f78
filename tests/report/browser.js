// Looks at pages as a reader would, in frames of several widths; the findings are left in the document, as JSON.
const brightness = (rgb) => {
  const part = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
};
const colour = (text) => text.match(/[\d.]+/g).map(Number);

// WCAG contrast of an element's text with the nearest opaque background around it.
function contrast(view, element) {
  const style = view.getComputedStyle(element);
  const ink = colour(element.namespaceURI.endsWith("svg") ? style.fill : style.color);
  let under = element, back = [0, 0, 0, 0];
  while (under && (back.length === 4 && back[3] < 1)) {
    back = colour(view.getComputedStyle(under).backgroundColor);
    under = under.parentElement;
  }
  const [a, b] = [brightness(ink), brightness(back)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}

function unreadable(frame) {
  const view = frame.contentWindow, found = [];
  for (const element of frame.contentDocument.body.querySelectorAll("*")) {
    const own = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join("").trim();
    if (!own || element.closest("script, style, .cameras") || !element.getClientRects().length) continue;
    const ratio = contrast(view, element);
    if (ratio < 4.5) found.push(`${own.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return found;
}

// What stands out beyond the frame's width, but for tables, which scroll in their own card.
function overflowing(frame) {
  const document = frame.contentDocument, width = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > width) found.push(`page: ${document.documentElement.scrollWidth}`);
  for (const element of document.body.querySelectorAll("*")) {
    if (element.closest(".scroll table") || element.closest("svg, script")) continue;
    const right = element.getBoundingClientRect().right;
    if (right > width + 0.5) found.push(`${element.className || element.tagName}: ${right}`);
    else if (!element.matches(".scroll, .track, pre") && element.scrollWidth > element.clientWidth + 1 && element.clientWidth)
      found.push(`within ${element.className || element.tagName}: ${element.textContent.slice(0, 40)}`);
  }
  return found;
}

// Presses every column's head twice; both orders must be those of the cells' figures, and be told to a screen reader.
function unsorted(frame) {
  const document = frame.contentDocument, found = [];
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const [t, table] of [...document.querySelectorAll("table")].entries()) {
    for (const head of table.tHead.rows[0].cells) {
      const name = `table ${t}, ${head.textContent}`, button = head.querySelector("button");
      button.focus();
      if (document.activeElement !== button) found.push(`${name}: no focus`);
      for (const order of ["ascending", "descending"]) {
        button.click();
        if (head.getAttribute("aria-sort") !== order) found.push(`${name}: aria-sort ${head.getAttribute("aria-sort")}`);
        if (table.querySelectorAll("[aria-sort]").length !== 1) found.push(`${name}: several sorted columns`);
        const cells = [...table.tBodies[0].rows].map((row) => row.cells[head.cellIndex]);
        const values = cells.map((cell) => cell.dataset.value ?? cell.textContent);
        const numeric = values.every((value) => value !== "" && !isNaN(Number(value)));
        for (let i = 1; i < values.length; i++) {
          const [low, high] = order === "ascending" ? [values[i - 1], values[i]] : [values[i], values[i - 1]];
          const wrong = numeric ? Number(low) > Number(high) : low.localeCompare(high) > 0;
          if (wrong) found.push(`${name}: ${low} before ${high}, ${order}`);
        }
      }
    }
  }
  return found;
}

function frameOf(html, width, scripts) {
  const frame = document.createElement("iframe");
  if (!scripts) frame.sandbox = "allow-same-origin";
  frame.style.cssText = `width:${width}px;height:900px;border:0;display:block`;
  frame.srcdoc = html;
  document.body.append(frame);
  return frame;
}

const frames = {};
for (const [name, html] of Object.entries(pages)) {
  for (const width of [360, 1100]) {
    frames[`${name} ${width}`] = frameOf(html, width, true);
    frames[`${name} ${width} no scripts`] = frameOf(html, width, false);
  }
}
onload = () => {
  const found = {};
  for (const [name, frame] of Object.entries(frames)) {
    const scripts = !name.endsWith("no scripts");
    const own = (found[name] = { text: frame.contentDocument.body.innerText });
    if (scripts) own.unsorted = unsorted(frame);
    else for (const details of frame.contentDocument.querySelectorAll("details")) details.open = true;
    own.tables = frame.contentDocument.querySelectorAll("table").length;
    own.overflowing = overflowing(frame);
    own.unreadable = unreadable(frame);
    own.background = getComputedStyle(frame.contentDocument.body).backgroundColor;
  }
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
};
