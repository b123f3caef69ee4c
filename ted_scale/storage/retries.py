"""Requests of a store that are retried while their failures are of the kind that pass, and the sentence about one that does not.

Credentials that are missing or old are looked for again with a fresh client, for KEYS_S. Note: what is retried is one request, so
patience bounds the time without an answer, not the time of a whole file.
"""

import random
import time

from ted_scale.base.errors import Gone, UserError
from ted_scale.storage.client import anew, may_come

LONGEST_PAUSE_S = 15
# Exceptions of botocore, multi-storage-client, urllib3 and Python by name: neither package must be there to ask.
PASSING = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "RetryableError", "TimeoutError", "HTTPError"}
PASSING |= {"CredentialRetrievalError", "ShortAnswer"}
PASSING_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "InternalError"}
PASSING_CODES |= {"ConditionalRequestConflict", "OperationAborted"}  # another request for the same object was under way
ABSENT_CODES = {"NoSuchKey", "NoSuchUpload", "404"}  # the answer to HEAD has no text, only the number
LOST_KEYS = {"NoCredentialsError", "PartialCredentialsError"}
OLD_KEYS = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidAccessKeyId"}
# New credentials are waited for so long: a service that gives them is slow at times, or a file is about to be replaced.
KEYS_S = 20


class Missing(UserError):
    """The object, or the upload in parts, is not there; its bucket is."""


class Changed(UserError):
    """The object is not of the version that a condition names."""


class Unsupported(UserError):
    """The store does not know this kind of request."""


class ShortAnswer(Exception):
    """Fewer bytes than were asked for."""


def persist(what: str, request, patience_s: float):
    """The answer to a request. It is retried with growing pauses while its failures are of the kind that pass."""
    end, keys_end, pause = time.monotonic() + patience_s, None, 0.05
    while True:
        try:
            return request()
        except Exception as error:
            links, now = list(chain(error)), time.monotonic()
            if not is_ours(links) and not passes(links):
                raise  # a bug of this program, not a failure of the store
            keys_end = (keys_end or now + min(patience_s, KEYS_S)) if may_get_keys(links) else None
            if keys_end and now + pause < keys_end:
                anew()
            elif not passes(links):
                raise kind_of(answer(links))(f"{what}, but {reason(links)}") from error
            elif now + pause > end:
                raise Gone(f"{what}, but was not for {patience_s:g} s: {reason(links)}") from error
        time.sleep(random.uniform(0.5, 1) * pause)  # all ranks fail at once, and must not all retry at once
        pause = min(2 * pause, LONGEST_PAUSE_S)


def may_get_keys(links) -> bool:
    """Whether it is for lack of credentials, and others may be there a moment later."""
    kinds = set().union(*(names(error) for error in links))
    return answer(links)[1] in OLD_KEYS or ("NoCredentialsError" in kinds and may_come())


def kind_of(answer: tuple[int, str]) -> type[UserError]:
    status, code = answer
    return Missing if code in ABSENT_CODES else {412: Changed, 501: Unsupported}.get(status, UserError)


def chain(error: BaseException | None):
    """An exception and those that it was raised from: multi-storage-client wraps botocore's."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def answer(links) -> tuple[int, str]:
    """(HTTP status, code) that the store answered with; (0, "") where it did not."""
    for error in links:
        response = getattr(error, "response", None)
        if isinstance(response, dict) and "Error" in response:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status, str(response["Error"].get("Code", status))
    return 0, ""


def passes(links) -> bool:
    status, code = answer(links)
    if status:
        return (status >= 500 and status != 501) or status in (408, 429) or code in PASSING_CODES
    return any(names(error) & PASSING for error in links)


def is_ours(links) -> bool:
    """Whether a failure comes from the store or from the connection to it."""
    known = {"BotoCoreError", "OSError", "PreconditionFailedError"}
    return bool(answer(links)[0]) or any(names(error) & known or is_of_msc(error) for error in links)


def is_of_msc(error: BaseException) -> bool:
    """multi-storage-client raises ValueError and RuntimeError for a profile that is missing or wrong."""
    trace, files = error.__traceback__, []
    while trace:
        files.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return any(name.partition(".")[0] == "multistorageclient" for name in files)


def reason(links) -> str:
    """The rest of the sentence: the fault, and how to correct it."""
    status, code = answer(links)
    kinds, said = set().union(*(names(error) for error in links)), " ".join(str(links[-1]).split())[:300]
    if kinds & LOST_KEYS:
        return "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if code in OLD_KEYS:
        return f"its credentials have expired or were replaced ({code}); set new ones"
    if code == "NoSuchBucket":
        return "its bucket does not exist; correct the path, or AWS_ENDPOINT_URL"
    if status in (401, 403) or "PermissionError" in kinds:
        return f"access is denied ({code or said}); check the credentials and what they allow"
    if status == 412 or "PreconditionFailedError" in kinds:
        return "it is another object than when this run began; start the run again"
    if status == 404 or "FileNotFoundError" in kinds:
        return "it is gone; check the path"
    if {"EndpointConnectionError", "ConnectTimeoutError"} & kinds:
        return f"its endpoint cannot be reached ({said}); check AWS_ENDPOINT_URL and the network"
    return f"the store says {code} ({said})" if code else f"the request fails ({type(links[-1]).__name__}: {said})"
