# ssepush behind Varnish. Varnish has no TLS, so put hitch or another proxy in front. Change: the backend.
# Tell ssepush the public name: --allow-host events.example.org
vcl 4.1;

backend ssepush {
    .host = "127.0.0.1";
    .port = "5000";
    # Both longer than --heartbeat (15 s): heartbeats keep a silent stream open.
    .first_byte_timeout = 60s;
    .between_bytes_timeout = 60s;
}

sub vcl_recv {
    # Not for strangers. Set SSEPUSH_PUBLISH_TOKEN before you take /publish off this list.
    if (req.url ~ "^/(publish|notifications|metrics|healthz)(\?|$)") {
        return (synth(403));
    }
    return (pass);  # nothing here can be cached; Varnish adds X-Forwarded-For
}

sub vcl_backend_response {
    # Never use do_gzip for a stream: it would hold everything back.
    set beresp.do_stream = true;
}

sub vcl_backend_error {
    # While ssepush is away, an error status would end a browser's EventSource for good. So the answer is a stream that
    # says "come back in 2 s" and ends. It contains no secret, so pages of any origin may read it.
    if (bereq.url ~ "^/stream(\?|$)") {
        set beresp.status = 200;
        set beresp.http.Content-Type = "text/event-stream";
        set beresp.http.Cache-Control = "no-store";
        if (bereq.http.Origin) {
            set beresp.http.Access-Control-Allow-Origin = bereq.http.Origin;
            set beresp.http.Access-Control-Allow-Credentials = "true";
        }
        set beresp.body = {"retry: 2000

"};
        return (deliver);
    }
}
