"use strict";
document.documentElement.classList.add("scripted");

// Tables: a column's button sorts by the cells' data-value, numbers largest first, names from A.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const before = head.getAttribute("aria-sort");
    const text = head.dataset.kind === "text";
    const ascending = before ? before === "descending" : text;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.value;
    const compare = text
      ? (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true })
      : (a, b) => Number(value(a)) - Number(value(b));
    body.append(...[...body.rows].sort((a, b) => (ascending ? 1 : -1) * compare(a, b)));
  }));
}

// Opacity of the maps of depths over the pictures.
for (const slider of document.querySelectorAll("input.overlay")) {
  slider.addEventListener("input", () => {
    document.documentElement.style.setProperty("--overlay", String(slider.value / 100));
    for (const other of document.querySelectorAll("input.overlay")) other.value = slider.value;
  });
}

// The sweep: one panel at a time, and its point in the charts.
const sweep = document.querySelector("#sweep-slider");
if (sweep) {
  const panels = [...document.querySelectorAll(".setting")];
  const show = () => {
    const index = Number(sweep.value);
    panels.forEach((panel, i) => { panel.hidden = i !== index; });
    document.querySelector("#sweep-value").textContent = panels[index].dataset.value;
    sweep.setAttribute("aria-valuetext", panels[index].dataset.label);
    for (const point of document.querySelectorAll("[id^=point-]")) {
      point.classList.toggle("current", point.id.endsWith(`-${index}`));
    }
  };
  sweep.addEventListener("input", show);
  show();
}
