// The peer `ws`: one Redis subscription, each message sent to every socket as it comes.
const { WebSocketServer } = require("ws");
const { createClient } = require("redis");

const sockets = new WebSocketServer({ port: Number(process.env.BENCH_PORT), perMessageDeflate: false });
const redis = createClient({ socket: { path: process.env.BENCH_SOCKET } });
redis.connect().then(() =>
  redis.subscribe(
    process.env.BENCH_CHANNEL,
    (message) => {
      for (const socket of sockets.clients) socket.send(message, { binary: false });
    },
    true,
  ),
);
