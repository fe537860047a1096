"""The images API: requests, their scheduler over the sampling driver, answers, and the page in the browser."""
