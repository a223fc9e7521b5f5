"""`./moco serve`: TensorFlow Serving's REST and gRPC for one encoder.

    config.py        what can be set, and its limits
    refusal.py       the one exception that a client gets to see, in the codes of gRPC and HTTP
    images.py        bytes from users into bytes that the model reads, limits first
    model.py         a SavedModel version: signatures, one outcome a row, warm-up
    batching.py      rows of many requests into batches; bounds on waiting and on what waits
    versions.py      which version is in service, and how the next one takes over
    service.py       what REST and gRPC share: a request with its model, deadline and metrics
    tensors_json.py  TensorFlow Serving's row and column form
    rest.py          HTTP
    grpc_service.py  gRPC
    incoming.py      gRPC's messages on their way in
    gzipped.py       compressed bodies and messages, unfolded piece by piece
    protos.py        states and signatures as TensorFlow Serving's protos
    faults.py        what is told and logged of an exception
    metrics.py       Prometheus
    ports.py         taking the ports
    app.py           the parts put together
    server.py        start and graceful stop

Imports neither TFX nor Beam; TensorFlow is imported when the ports are bound.
"""
