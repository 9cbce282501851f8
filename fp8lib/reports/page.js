"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const numbers = head.classList.contains("number");
      const rank = (text) => (text === "nan" ? Infinity : text === "inf" ? Number.MAX_VALUE : Number(text));
      const rows = [...body.rows].sort((one, two) => {
        const [a, b] = [key(one), key(two)];
        const order = numbers ? (rank(a) < rank(b) ? -1 : rank(a) > rank(b) ? 1 : 0) : a.localeCompare(b, "en", { numeric: true });
        return up ? order : -order;
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...rows);
    });
  });
}
