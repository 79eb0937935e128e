"""Tools for agents (Model Context Protocol) over the client: bounded answers, and nothing is done twice."""
