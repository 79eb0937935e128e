// The states that the whole page shares, connected to the calls that tell about them.
import { get, watchAnswers, watchSession } from "../api/client.ts";
import { reachability } from "./reachability.svelte.ts";
import { Session } from "./session.svelte.ts";

export const session = new Session(() => get("/api/jobs?limit=1"));

watchAnswers(reachability.noteAnswer, reachability.suspect);
watchSession(session.confirm, session.deny);
