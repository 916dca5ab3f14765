"""A small HTTP service over ``fastpeft.serving``; ``examples/serve.py`` starts it.

- ``engine.py``: one decode loop for all requests, on a thread of its own. Knows tokens, knows neither text nor HTTP.
- ``cache.py``: the keys and values of the requests that run. ``sampling.py``: the next token of each.
- ``catalog.py``: adapters by the names that clients know; uploads.
- ``protocol.py``: OpenAI's requests and answers. ``generation.py``: from one to the other through the engine.
  ``text.py``: tokens to text, piece by piece.
- ``api.py``: HTTP. ``metrics.py``: Prometheus' text format.
- ``shared.py`` and ``asgi.py``: what ``examples/serve_ray.py`` needs for several replicas of all this.
- ``styles.py``: the adapters of the example, and how they are trained.
"""
