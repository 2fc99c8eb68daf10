"""Whose words a token belongs to: a role of one byte.

Plain text is `prompt` and `response`. A chat's turns have the roles of their messages, and `prompt`
is what its template writes to let the assistant speak, or around its turn.
"""

ROLES = ("prompt", "response", "system", "user", "assistant", "tool")
"""Names by code."""

PROMPT, RESPONSE, SYSTEM, USER, ASSISTANT, TOOL = range(len(ROLES))

ANSWERS = (RESPONSE, ASSISTANT)
"""Of what the model is to say itself; all others are given to it."""
