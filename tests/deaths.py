"""A process that dies at a chosen call, in the process of the test."""


class Killed(BaseException):
    """What SIGKILL does at this point."""


def killed_at(number, monkeypatch, places, action, *, after=False):
    """Run `action`, dying before (or `after`) the `number`-th call of any (owner, name) of `places`.

    Returns whether it got so far, and how many calls there were.
    """
    count = 0

    def wrap(original):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count != number:
                return original(*args, **kwargs)
            if after:
                original(*args, **kwargs)
            raise Killed

        return wrapped

    with monkeypatch.context() as patched:
        for owner, name in places:
            patched.setattr(owner, name, wrap(getattr(owner, name)))
        try:
            action()
        except Killed:
            return True, count
    return False, count
