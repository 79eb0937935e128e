import { assert, beforeEach, test } from "vitest";
import { COLUMNS, direction, metricColumn, nextSort, readShown, ShownColumns } from "./columns.svelte.ts";
import { readViews, SavedViews } from "./savedviews.svelte.ts";

const column = (id: string): (typeof COLUMNS)[number] => COLUMNS.find((one) => one.id === id) ?? COLUMNS[0];

beforeEach(() => window.localStorage.clear());

test("clicks on a head sort, turn the order round, and end it", () => {
  const age = column("age");
  assert.strictEqual(nextSort(age, "active"), "-created_at");
  assert.strictEqual(nextSort(age, "-created_at"), "created_at");
  assert.isNull(nextSort(age, "created_at"));
  assert.isNull(nextSort(column("state"), "name"));
  assert.strictEqual(nextSort(column("detail"), "name"), "name");
  assert.strictEqual(direction(age, "-created_at"), "descending");
  assert.strictEqual(direction(column("name"), "name"), "ascending");
  assert.isUndefined(direction(age, "name"));
  assert.strictEqual(metricColumn("eval/acc").sort, "-metrics.eval/acc.last");
});

test("columns and widths are remembered, within bounds", () => {
  const columns = new ShownColumns();
  columns.toggle("priority");
  columns.toggle("state");
  columns.toggle("name"); // stays: it has the link
  columns.toggle("metric:eval/acc");
  columns.resize("queue", 5);
  columns.resize("labels", 1e9);
  const again = new ShownColumns();
  assert.notInclude(again.ids, "state");
  assert.includeMembers([...again.ids], ["name", "priority", "metric:eval/acc"]);
  assert.deepEqual(
    again.list.filter(({ id }) => id === "queue" || id === "labels").map(({ width }) => width),
    [48, 900],
  );
  again.reset();
  assert.include(new ShownColumns().ids, "state");
});

test("what something else stored is no setting", () => {
  for (const stored of [null, 5, [], {}, { ids: "name" }]) assert.isNull(readShown(stored));
  assert.deepEqual(readShown({ ids: ["nope", 5, "state", "state"], widths: { state: "wide", name: 99 } }), {
    ids: ["name", "state"],
    widths: { name: 99 },
  });
  window.localStorage.setItem("apt_jobs.columns", "{broken");
  assert.include(new ShownColumns().ids, "state");
  assert.isNull(readViews({}));
  assert.deepEqual(readViews([{ name: "a", filter: "x" }, 5, { name: "b", filter: "", sort: "name" }]), [
    { name: "b", filter: "", sort: "name" },
  ]);
});

test("views are kept under their names, at most fifty", () => {
  const views = new SavedViews();
  assert.isNull(views.save({ name: " mine ", filter: "label:team=a", sort: "active" }));
  assert.isNull(views.save({ name: "mine", filter: "", sort: "name" }));
  assert.deepEqual(new SavedViews().list, [{ name: "mine", filter: "", sort: "name" }]);
  assert.isString(views.save({ name: "  ", filter: "", sort: "" }));
  for (let index = 0; index < 60; index += 1) views.save({ name: `view ${index}`, filter: "", sort: "" });
  assert.strictEqual(views.list.length, 50);
  views.remove("mine");
  assert.strictEqual(new SavedViews().list.length, 49);
});
