for (const button of document.querySelectorAll("th button")) {
  button.onclick = () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (a, b) => (isNaN(a - b) ? String(a).localeCompare(b) : a - b);
    const rows = [...body.rows].sort((a, b) => (down ? compare(key(b), key(a)) : compare(key(a), key(b))));
    body.append(...rows);
  };
}
