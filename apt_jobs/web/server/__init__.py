"""Protocols below ASGI: bounded HTTP, and WebSockets that write straight to their transport."""
