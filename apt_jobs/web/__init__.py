"""REST, WebSocket, the built user interface, and the small loops that need no leader."""
