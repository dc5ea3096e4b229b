"""Numbers from frozen or tuned weights."""
