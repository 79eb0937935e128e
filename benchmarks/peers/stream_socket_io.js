// The peer `socket.io`: one Redis subscription, each message emitted to everyone as it comes.
const { Server } = require("socket.io");
const { createClient } = require("redis");

const io = new Server(Number(process.env.BENCH_PORT), { transports: ["websocket"], perMessageDeflate: false });
const redis = createClient({ socket: { path: process.env.BENCH_SOCKET } });
redis.connect().then(() => redis.subscribe(process.env.BENCH_CHANNEL, (message) => io.emit("event", message)));
