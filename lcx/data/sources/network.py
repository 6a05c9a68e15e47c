"""Can a download work at all? Asked before handing over to a library that would retry for minutes."""

import urllib.error
import urllib.request

_SECONDS = 10


def unreachable(url: str) -> str:
    """Why the server of a URL cannot be reached; "" if it answers, whatever it answers. The usual proxy settings apply."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_SECONDS).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""
