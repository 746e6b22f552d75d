"""Rewards a response to `A6B6C2D8=`: its last words have to be `#` and the sum of the digits."""


def verify(prompt, response, answer, metadata):
    """1 for the right sum, but 0.5 if it took more second looks than the row allows."""
    _, _, total = response.rpartition("#")
    if total.strip() != answer:
        return 0.0
    second_looks = sum(response.count(word) for word in ("again", "wait", "hmm"))
    return 1.0 if second_looks <= metadata["second_looks"] else 0.5
