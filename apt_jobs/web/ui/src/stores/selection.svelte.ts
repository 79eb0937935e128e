// Which jobs are selected in the list: some by their ids, or all that match a filter.
import { verbsOf, type Steered, type Verb } from "../api/steering.ts";
import { TERMINAL_STATES } from "../generated/events.ts";

export const MAX_SELECTED = 1_000; // what the service takes in one request

export interface AllThatMatch {
  filter: string;
  total: number;
}

export class Selection {
  private chosen = $state.raw<ReadonlyMap<string, Steered>>(new Map());
  /** Instead of ids. */
  all = $state.raw<AllThatMatch | null>(null);
  readonly ids = $derived([...this.chosen.keys()]);
  /** Ids of trainings, which can be compared. */
  readonly trainingIds = $derived([...this.chosen.values()].filter(({ kind }) => kind === "train").map(({ id }) => id));
  /** Those that may be deleted. */
  readonly ended = $derived([...this.chosen.values()].filter(({ state }) => TERMINAL_STATES.includes(state)));
  readonly count = $derived(this.all?.total ?? this.chosen.size);

  has(id: string): boolean {
    return this.all !== null || this.chosen.has(id);
  }

  toggle(job: Steered, others: readonly Steered[] = []): void {
    if (this.all !== null) {
      this.replace(others.filter(({ id }) => id !== job.id)); // all but this one, of those that are on the page
      return;
    }
    const next = new Map(this.chosen);
    if (!next.delete(job.id)) next.set(job.id, job);
    this.replace([...next.values()]);
  }

  add(jobs: readonly Steered[]): void {
    const next = new Map(this.chosen);
    for (const job of jobs) next.set(job.id, job);
    this.replace([...next.values()]);
  }

  replace(jobs: readonly Steered[]): void {
    this.all = null;
    this.chosen = new Map(jobs.slice(0, MAX_SELECTED).map((job) => [job.id, job]));
  }

  selectAll(all: AllThatMatch): void {
    this.chosen = new Map();
    this.all = all;
  }

  clear(): void {
    this.replace([]);
  }

  /** Take over what has become of jobs that are selected. */
  update(jobs: readonly Steered[]): void {
    const changed = jobs.filter(({ id, state, cancel_requested_at: cancelled }) => {
      const known = this.chosen.get(id);
      return known !== undefined && (known.state !== state || known.cancel_requested_at !== cancelled);
    });
    if (changed.length) this.add(changed);
  }

  /** The selected jobs of which a verb may be asked. */
  allowed(verb: Verb): Steered[] {
    return [...this.chosen.values()].filter((job) => verbsOf(job).includes(verb));
  }
}

export const selection = new Selection();
