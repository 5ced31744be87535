"""An HTTP server of OpenAI's protocol: the engine in one process, HTTP in another (`engine_process`, `http_process`)."""
