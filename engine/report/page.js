// Sorts and filters the work list. Without this script the list is a plain table, highest risk first.
"use strict";
(() => {
  const table = document.getElementById("work");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  const words = new Intl.Collator("en", { numeric: true });

  const valueOf = (row, column, isNumber) => {
    const cell = row.cells[column];
    if (!isNumber) return cell.textContent.trim();
    const value = cell.dataset.value;
    return value === "" || value === undefined ? NaN : Number(value);
  };

  const sortBy = (column, direction) => {
    const isNumber = headers[column].dataset.kind === "number";
    const keyed = rows.map((row) => [valueOf(row, column, isNumber), row]);
    keyed.sort(([left], [right]) => {
      if (!isNumber) return direction * words.compare(left, right);
      if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(left) - Number.isNaN(right); // last
      return direction * (left - right);
    });
    body.append(...keyed.map(([, row]) => row));
    for (const header of headers) header.removeAttribute("aria-sort");
    headers[column].setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  };

  headers.forEach((header, column) => {
    if (!header.dataset.kind) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const order = header.getAttribute("aria-sort");
      const first = header.dataset.kind === "number" ? -1 : 1;
      sortBy(column, order ? (order === "ascending" ? -1 : 1) : first);
    });
  });

  const filters = document.querySelector(".filters");
  const text = document.getElementById("filter-text");
  const choices = [...filters.querySelectorAll("select")];
  const count = document.getElementById("filter-count");
  const searched = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  const filter = () => {
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits =
        searched.get(row).includes(wanted) &&
        choices.every((choice) => {
          if (!choice.value) return true;
          const name = choice.id.replace("filter-", "");
          const value = row.dataset[name];
          return name === "list" || name === "flag" ? value.split(" ").includes(choice.value) : value === choice.value;
        });
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  };

  text.addEventListener("input", filter);
  for (const choice of choices) choice.addEventListener("change", filter);
  filters.hidden = false;
  filter();
})();
