/* load.c: opens event streams, publishes numbered messages and measures how they arrive.
 *
 *   load streams PORT PATH COUNT PUBLISHER           opens COUNT streams of GET PATH, then obeys standard input:
 *       run OUTSTANDING BYTES SECONDS                publishes, with so many messages on their way at any time
 *       pace PER_S BYTES SECONDS                     publishes so many a second, whatever becomes of them; the next
 *                                                    command ends it
 *       idle SECONDS                                 keeps the streams open and publishes nothing
 *   load return PORT PATH COUNT ID MESSAGES          opens COUNT streams at once with this Last-Event-ID, as browsers do
 *                                                    after a restart; each is back when it has the last of so many
 *                                                    missed messages
 *   load newcomers PORT PATH PER_S SECONDS           opens so many streams a second, and keeps them open
 *   load post PORT PATH CONNECTIONS PER_S SECONDS    POSTs a small JSON body over kept-alive connections; PER_S 0: as
 *                                                    fast as they are answered
 *
 * PUBLISHER is redis:PORT:CHANNEL (PUBLISH of a flask-sse message), nchan:PORT:PATH (an HTTP POST of the bare text)
 * or raw:PORT (a whole SSE frame). Opening and every command answer with one line of JSON on standard output.
 *
 * Every message's text ends in a marker, '#' and the ten digits of its number, and nothing else in it has a '#'. The
 * streams are searched for markers only, so it does not matter how a server frames events or splits them over reads,
 * nor what it sends besides: positions, reconnection times and heartbeats count as nothing.
 * In a run, a message counts as delivered when all streams got it; only then is the next one published in its place.
 *
 * One thread, one epoll. What is measured at the same time runs in processes of their own, so that opening streams
 * delays no reading. Deliberate shortcuts: writes to publishers block (they always read), and a connection of "post"
 * assumes that a request's few hundred bytes fit into the socket's buffer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    MARKER_DIGITS = 10,
    MAX_OUTSTANDING = 64,
    SLOTS = 1024, /* far more than MAX_OUTSTANDING, in case messages overtake each other */
    MAX_BYTES = 64 * 1024,
    READ_BYTES = 256 * 1024,
    MAX_EVENTS = 1024,
    OPEN_WINDOW = 256,   /* streams that may wait for their head at once: below usual listen backlogs */
    RETURN_WINDOW = 800, /* the same for streams that return; more, and it is the kernel's retries that are measured */
    RETURN_AGAIN_NS = 1000000000, /* after which a stream that was refused or cut comes again */
    OPEN_LIMIT_S = 120,
    HEADLESS_NS = 1000000000,
    PROBE_NS = 50000000,
    QUIET_NS = 100000000,
    STALL_LIMIT_S = 10,  /* without any delivery for so long, a run gives up */
    MAX_POSTERS = 256,
    POST_BYTES = 64,
};

/* ---- small things ------------------------------------------------------------------------------------------- */

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t in_seconds(double seconds) { return now_ns() + (uint64_t)(seconds * 1e9); }

static double cpu_s(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static int connect_to(int port, bool blocking) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | (blocking ? 0 : SOCK_NONBLOCK), 0);
    if (fd < 0) die("socket: %s", strerror(errno));
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        if (blocking) die("connect to port %d: %s", port, strerror(errno));
        close(fd);
        return -1;
    }
    return fd;
}

static void send_all(int fd, const char *bytes, size_t length) {
    while (length > 0) {
        ssize_t n = send(fd, bytes, length, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) die("the publishing connection broke: %s", strerror(errno));
        bytes += n;
        length -= (size_t)n;
    }
}

static int poller;

static void watch(int operation, int fd, uint32_t events, uint32_t index) {
    struct epoll_event e = {.events = events, .data.u32 = index};
    if (epoll_ctl(poller, operation, fd, &e) < 0) die("epoll_ctl: %s", strerror(errno));
}

/* ---- histogram of latencies: 32 steps per power of two, so at most 3 % off ------------------------------------ */

static uint64_t histogram[2048], longest_ns;

static void histogram_clear(void) {
    memset(histogram, 0, sizeof histogram);
    longest_ns = 0;
}

static void histogram_add(uint64_t ns) {
    if (ns > longest_ns) longest_ns = ns;
    int shift = ns < 64 ? 0 : 63 - __builtin_clzll(ns) - 5;
    histogram[(uint64_t)shift * 32 + (ns >> shift)]++;
}

static double percentile_us(double share) {
    uint64_t total = 0, sum = 0;
    for (int i = 0; i < 2048; i++) total += histogram[i];
    for (int i = 0; i < 2048; i++) {
        sum += histogram[i];
        if (total > 0 && (double)sum >= share * (double)total) {
            int shift = i < 64 ? 0 : i / 32 - 1;
            return ((double)(i - shift * 32) + 0.5) * (double)(1ull << shift) / 1e3;
        }
    }
    return 0;
}

static void print_latency(void) {
    printf("\"latency_p50_us\": %.2f, \"latency_p99_us\": %.2f, \"latency_p999_us\": %.2f, \"latency_max_us\": %.2f",
           percentile_us(0.5), percentile_us(0.99), percentile_us(0.999), (double)longest_ns / 1e3);
}

/* ---- messages ----------------------------------------------------------------------------------------------- */

static struct message {
    uint32_t number;
    uint32_t missing; /* streams that have not got it yet */
    uint64_t sent_ns;
} slots[SLOTS];

static uint32_t next_number = 1;
static uint32_t first_number = 1; /* of this run: lower ones are probes, or late from an earlier run */
static uint32_t goal;      /* of streams that return: the number of the last message that each has missed */
static uint64_t return_ns; /* when they all began to */
static uint64_t overtaken; /* messages that were still on their way when their slot was needed: they count as missing */
static uint64_t published, completed, deliveries, strays;
static uint64_t last_marker_ns;

/* ---- publishing --------------------------------------------------------------------------------------------- */

static struct {
    enum { REDIS, NCHAN, RAW } kind;
    int port;
    char name[200]; /* the channel, or the path */
    int fd;
    long receivers; /* what Redis answered to the last PUBLISH */
    uint64_t errors;
} publisher;

static char publish_buffer[MAX_OUTSTANDING * (MAX_BYTES + 512)];

static size_t put_text(char *to, uint32_t number, int bytes) {
    int padding = bytes - MARKER_DIGITS - 1;
    memset(to, 'x', (size_t)padding);
    sprintf(to + padding, "#%010u", number);
    return (size_t)bytes;
}

static size_t put_message(char *to, uint32_t number, int bytes) {
    static char text[MAX_BYTES + 1];
    put_text(text, number, bytes);
    switch (publisher.kind) {
    case REDIS: {
        const char *command = "*3\r\n$7\r\nPUBLISH\r\n$%zu\r\n%s\r\n$%d\r\n{\"data\": \"%s\"}\r\n";
        return (size_t)sprintf(to, command, strlen(publisher.name), publisher.name, bytes + 12, text);
    }
    case NCHAN: {
        const char *request = "POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%s";
        return (size_t)sprintf(to, request, publisher.name, bytes, text);
    }
    default:
        return (size_t)sprintf(to, "data: %s\n\n", text);
    }
}

/* Publishes so many messages in one write; each is expected on `streams` streams. */
static void publish(uint64_t count, int bytes, uint32_t streams) {
    size_t length = 0;
    uint64_t sent_ns = now_ns();
    for (uint64_t i = 0; i < count; i++) {
        struct message *m = &slots[next_number % SLOTS];
        if (m->missing > 0 && m->number >= first_number) overtaken++;
        *m = (struct message){.number = next_number, .missing = streams, .sent_ns = sent_ns};
        length += put_message(publish_buffer + length, next_number++, bytes);
        published++;
    }
    send_all(publisher.fd, publish_buffer, length);
}

/* Replies are not waited for: they only tell errors, and how many subscribers Redis reached. */
static void read_replies(void) {
    static char buffer[READ_BYTES + 1];
    ssize_t n = recv(publisher.fd, buffer, READ_BYTES, MSG_DONTWAIT);
    if (n == 0) die("the publishing connection was closed");
    if (n < 0) return;
    buffer[n] = 0;
    if (publisher.kind == REDIS && buffer[0] == ':') publisher.receivers = atol(buffer + 1);
    if (publisher.kind == REDIS && buffer[0] == '-') publisher.errors++;
    if (publisher.kind == NCHAN && (strstr(buffer, "HTTP/1.1 4") || strstr(buffer, "HTTP/1.1 5"))) publisher.errors++;
}

static void parse_publisher(const char *spec) {
    char kind[16];
    if (sscanf(spec, "%15[a-z]:%d:%199s", kind, &publisher.port, publisher.name) < 2) die("publisher? %s", spec);
    publisher.kind = !strcmp(kind, "redis") ? REDIS : !strcmp(kind, "nchan") ? NCHAN : RAW;
    publisher.fd = connect_to(publisher.port, true);
    if (publisher.kind == RAW) send_all(publisher.fd, "FEED\n", 5); /* the floor's sign for "not a stream" */
}

/* ---- streams ------------------------------------------------------------------------------------------------ */

enum state { CONNECTING, WAITING, OPEN, DEAD };

static struct stream {
    int fd;
    uint8_t state;
    uint8_t head_matched; /* of "HTTP/1.? 200" */
    uint8_t digits_left;  /* of the marker that the last read ended in */
    bool reached;         /* got some message: the subscription really stands */
    uint32_t number;
    uint32_t arrived; /* messages of this run */
    uint64_t began_ns; /* when it was opened, or is to be opened again */
} *streams;

static uint32_t stream_count, head_count, reached_count, dead_count;
static int port;
static char request[512];

static void kill_stream(struct stream *s) {
    close(s->fd);
    if (s->state == OPEN) head_count--;
    if (s->reached) reached_count--;
    s->reached = false;
    s->state = DEAD;
    s->began_ns = now_ns() + RETURN_AGAIN_NS;
    dead_count++;
}

static void open_stream(uint32_t index) {
    struct stream *s = &streams[index];
    *s = (struct stream){.fd = connect_to(port, false), .state = CONNECTING, .began_ns = now_ns()};
    if (s->fd < 0) {
        s->state = DEAD;
        dead_count++;
        return;
    }
    watch(EPOLL_CTL_ADD, s->fd, EPOLLOUT, index);
}

static void send_request(uint32_t index) {
    struct stream *s = &streams[index];
    ssize_t length = (ssize_t)strlen(request);
    if (send(s->fd, request, (size_t)length, MSG_NOSIGNAL) != length) {
        kill_stream(s);
        return;
    }
    s->state = WAITING;
    watch(EPOLL_CTL_MOD, s->fd, EPOLLIN | EPOLLRDHUP | EPOLLET, index);
}

static void on_marker(struct stream *s, uint32_t number, uint64_t at_ns) {
    last_marker_ns = at_ns;
    if (!s->reached) {
        s->reached = goal == 0 || number == goal;
        reached_count += s->reached;
    }
    if (goal > 0) {
        s->arrived++;
        if (number == goal) histogram_add(at_ns - return_ns);
    }
    if (number < first_number || goal > 0) return;
    struct message *m = &slots[number % SLOTS];
    if (m->number != number || m->missing == 0) {
        strays++;
        return;
    }
    histogram_add(at_ns - m->sent_ns);
    deliveries++;
    s->arrived++;
    if (--m->missing == 0) completed++;
}

static void scan(struct stream *s, const char *p, const char *end, uint64_t at_ns) {
    while (p < end) {
        if (s->digits_left == 0) {
            p = memchr(p, '#', (size_t)(end - p));
            if (p == NULL) return;
            p++;
            s->digits_left = MARKER_DIGITS;
            s->number = 0;
        } else if (*p >= '0' && *p <= '9') {
            s->number = s->number * 10 + (uint32_t)(*p++ - '0');
            if (--s->digits_left == 0) on_marker(s, s->number, at_ns);
        } else {
            s->digits_left = 0; /* some other '#' */
        }
    }
}

/* Anything but a status line with 200 in it is a refusal. Tells how many of the bytes belong to it, or -1. */
static ssize_t match_head(struct stream *s, const char *bytes, ssize_t n) {
    static const char expected[] = "HTTP/1.? 200";
    ssize_t i = 0;
    for (; i < n && expected[s->head_matched]; i++, s->head_matched++)
        if (expected[s->head_matched] != '?' && expected[s->head_matched] != bytes[i]) return -1;
    if (!expected[s->head_matched]) {
        s->state = OPEN;
        head_count++;
        if (goal == 0) histogram_add(now_ns() - s->began_ns);
    }
    return i;
}

static void on_stream(uint32_t index, uint32_t events) {
    static char buffer[READ_BYTES];
    struct stream *s = &streams[index];
    if (s->state == CONNECTING) {
        if (events & (EPOLLERR | EPOLLHUP)) kill_stream(s);
        else send_request(index);
        return;
    }
    ssize_t n;
    do {
        n = recv(s->fd, buffer, sizeof buffer, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN) return;
        ssize_t skip = n > 0 && s->state == WAITING ? match_head(s, buffer, n) : 0;
        if (n <= 0 || skip < 0) {
            kill_stream(s);
            return;
        }
        scan(s, buffer + skip, buffer + n, now_ns());
        /* Edge-triggered: a short read has emptied the socket, unless its end has come too. */
    } while (n == sizeof buffer || events & EPOLLRDHUP);
}

static void turn(int timeout_ms) {
    static struct epoll_event events[MAX_EVENTS];
    int n = epoll_wait(poller, events, MAX_EVENTS, timeout_ms);
    for (int i = 0; i < n; i++) {
        if (events[i].data.u32 == stream_count) read_replies();
        else on_stream(events[i].data.u32, events[i].events);
    }
}

/* ---- commands ----------------------------------------------------------------------------------------------- */

/* Opens all streams as fast as the server takes them, then sends probes until every stream has seen one. Some servers
 * send no head before the first event: when none at all comes for a second, heads are no longer waited for. Probes are
 * work for the server, so while heads still come there are none, and the waits between them grow. */
static void command_open(void) {
    uint64_t start_ns = now_ns(), limit_ns = in_seconds(OPEN_LIMIT_S), progress_ns = start_ns, heads_ns = 0;
    uint32_t next = 0, before = 0, probes = 0;
    uint64_t probe_ns = PROBE_NS;
    bool headless = false;
    first_number = UINT32_MAX; /* all that comes now are probes */
    while (reached_count + dead_count < stream_count && now_ns() < limit_ns) {
        uint32_t burst = 0;
        while (next < stream_count && burst < OPEN_WINDOW && (headless || next - head_count - dead_count < OPEN_WINDOW))
            open_stream(next++), burst++;
        turn(5);
        uint64_t now = now_ns();
        uint32_t answered = head_count + reached_count + dead_count;
        if (answered != before || burst > 0) progress_ns = now;
        before = answered;
        if (head_count + dead_count == stream_count && heads_ns == 0) heads_ns = now;
        if (head_count == 0 && now - start_ns > HEADLESS_NS) headless = true;
        uint64_t quiet_ns = now - (last_marker_ns > progress_ns ? last_marker_ns : progress_ns);
        bool first_probe = heads_ns && probes == 0;
        uint64_t patience_ns = heads_ns ? probe_ns : headless ? 4 * probe_ns : HEADLESS_NS;
        if (next == stream_count && (first_probe || quiet_ns > patience_ns)) {
            publish(1, 64, stream_count);
            probes++;
            progress_ns = now_ns();
            if (probe_ns < 10 * PROBE_NS) probe_ns += probe_ns / 2;
        }
    }
    uint64_t end_ns = now_ns();
    printf("{\"streams\": %u, \"reached\": %u, \"refused\": %u, \"heads_s\": %.4f, \"open_s\": %.4f, \"probes\": %u, "
           "\"receivers\": %ld}\n",
           stream_count, reached_count, dead_count, heads_ns ? (double)(heads_ns - start_ns) / 1e9 : 0.0,
           (double)(end_ns - start_ns) / 1e9, probes, publisher.receivers);
}

/* Late probes would be work that nobody counts: wait until nothing has come for a while. */
static void wait_for_quiet(void) {
    uint64_t start_ns = now_ns(), limit_ns = in_seconds(STALL_LIMIT_S);
    while (now_ns() < limit_ns) {
        turn(20);
        if (now_ns() - (last_marker_ns > start_ns ? last_marker_ns : start_ns) > QUIET_NS) return;
    }
}

static void begin_publishing(void) {
    wait_for_quiet();
    histogram_clear();
    first_number = next_number;
    published = completed = overtaken = deliveries = strays = 0;
    for (uint32_t i = 0; i < stream_count; i++) streams[i].arrived = 0;
    if (reached_count == 0) die("no stream is open");
}

static uint32_t uneven_streams(uint64_t messages) {
    uint32_t uneven = 0;
    for (uint32_t i = 0; i < stream_count; i++)
        if (streams[i].state == OPEN && streams[i].arrived != messages) uneven++;
    return uneven;
}

static void print_run(uint32_t audience, double elapsed_s, double used_cpu_s) {
    printf("{\"streams\": %u, \"messages\": %lu, \"deliveries\": %lu, \"elapsed_s\": %.6f, ", audience, published,
           deliveries, elapsed_s);
    print_latency();
    uint64_t missing = published * audience - deliveries;
    printf(", \"load_cpu_s\": %.6f, \"missing\": %lu, \"uneven_streams\": %u, \"strays\": %lu, \"closed\": %u, "
           "\"publish_errors\": %lu, \"receivers\": %ld}\n",
           used_cpu_s, missing, uneven_streams(published), strays, dead_count, publisher.errors, publisher.receivers);
}

static void command_run(int outstanding, int bytes, double seconds) {
    if (outstanding < 1 || outstanding > MAX_OUTSTANDING || bytes < MARKER_DIGITS + 1 || bytes > MAX_BYTES)
        die("run: out of range");
    begin_publishing();
    uint32_t audience = reached_count;
    double cpu_before_s = cpu_s();
    uint64_t start_ns = now_ns(), end_ns = in_seconds(seconds);
    last_marker_ns = start_ns;
    for (;;) {
        bool over = now_ns() >= end_ns;
        if (!over) publish(completed + (uint64_t)outstanding - published, bytes, audience);
        else if (completed == published) break;
        if (now_ns() - last_marker_ns > STALL_LIMIT_S * 1000000000ull) break;
        uint64_t done = completed;
        while (completed == done && now_ns() - last_marker_ns <= STALL_LIMIT_S * 1000000000ull) turn(50);
    }
    double elapsed_s = (double)(last_marker_ns - start_ns) / 1e9;
    print_run(audience, elapsed_s, cpu_s() - cpu_before_s);
}

/* The next command's first byte ends it; what is on its way then still counts. */
static void command_pace(double per_s, int bytes, double seconds) {
    if (per_s <= 0 || per_s > 10000 || bytes < MARKER_DIGITS + 1 || bytes > MAX_BYTES) die("pace: out of range");
    begin_publishing();
    uint32_t audience = reached_count;
    double cpu_before_s = cpu_s();
    uint64_t start_ns = now_ns(), end_ns = in_seconds(seconds);
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    while (now_ns() < end_ns && poll(&input, 1, 0) == 0) {
        if ((double)(now_ns() - start_ns) * per_s / 1e9 >= (double)published) publish(1, bytes, audience);
        turn(1);
    }
    uint64_t limit_ns = in_seconds(STALL_LIMIT_S);
    double elapsed_s = (double)(now_ns() - start_ns) / 1e9;
    while (completed + overtaken < published && now_ns() < limit_ns) turn(20);
    print_run(audience, elapsed_s, cpu_s() - cpu_before_s);
}

static void command_idle(double seconds) {
    double cpu_before_s = cpu_s();
    uint64_t end_ns = in_seconds(seconds);
    while (now_ns() < end_ns) turn(100);
    printf("{\"idle_s\": %.1f, \"closed\": %u, \"load_cpu_s\": %.4f}\n", seconds, dead_count, cpu_s() - cpu_before_s);
}

static void obey(char *line) {
    int outstanding, bytes;
    double per_s, seconds;
    if (sscanf(line, "run %d %d %lf", &outstanding, &bytes, &seconds) == 3) {
        alarm((unsigned)seconds + 6 * STALL_LIMIT_S);
        command_run(outstanding, bytes, seconds);
    } else if (sscanf(line, "pace %lf %d %lf", &per_s, &bytes, &seconds) == 3) {
        alarm((unsigned)seconds + 3 * STALL_LIMIT_S);
        command_pace(per_s, bytes, seconds);
    } else if (sscanf(line, "idle %lf", &seconds) == 1) {
        alarm((unsigned)seconds + STALL_LIMIT_S);
        command_idle(seconds);
    } else if (strcmp(line, "stop\n") != 0) { /* "stop" has ended a pace, and says nothing more */
        die("command? %s", line);
    }
    fflush(stdout);
    alarm(0);
}

/* ---- post ---------------------------------------------------------------------------------------------------- */

static struct poster {
    int fd;
    uint64_t sent_ns;
    size_t length;
    char answer[8192];
} posters[MAX_POSTERS];

static void post(struct poster *p) {
    p->length = 0;
    p->sent_ns = now_ns();
    send_all(p->fd, request, strlen(request));
}

/* The status, once the whole answer is there; 0 before; -1 for an answer that this reader does not understand. */
static int answer_status(struct poster *p) {
    p->answer[p->length] = 0;
    char *head_end = strstr(p->answer, "\r\n\r\n");
    if (head_end == NULL) return p->length < sizeof p->answer - 1 ? 0 : -1;
    char *length = strcasestr(p->answer, "\r\ncontent-length:");
    if (length == NULL || length > head_end) return -1;
    size_t whole = (size_t)(head_end + 4 - p->answer) + (size_t)atol(length + 17);
    if (whole >= sizeof p->answer) return -1;
    return p->length >= whole ? atoi(p->answer + 9) : 0;
}

static void prepare_post(const char *path) {
    char text[POST_BYTES + 1], body[256];
    put_text(text, 1, POST_BYTES);
    snprintf(body, sizeof body, "{\"channel\": \"posted\", \"data\": \"%s\"}", text);
    const char *head = "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                       "Content-Length: %zu\r\n\r\n%s";
    snprintf(request, sizeof request, head, path, port, strlen(body), body);
}

static void connect_poster(uint32_t index) {
    posters[index].fd = connect_to(port, true);
    watch(EPOLL_CTL_ADD, posters[index].fd, EPOLLIN, index);
}

/* The status of the answer; 0 while it is not whole; a connection that is of no use any more is replaced. */
static int read_answer(uint32_t index) {
    struct poster *p = &posters[index];
    ssize_t got = recv(p->fd, p->answer + p->length, sizeof p->answer - 1 - p->length, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    if (got > 0) p->length += (size_t)got;
    int status = got > 0 ? answer_status(p) : -1;
    if (status < 0) {
        close(p->fd);
        connect_poster(index);
    }
    return status;
}

static void mode_post(const char *path, uint32_t connections, double per_s, double seconds) {
    if (connections < 1 || connections > MAX_POSTERS) die("connections out of range");
    alarm((unsigned)seconds + 4 * STALL_LIMIT_S);
    prepare_post(path);
    uint32_t idle[MAX_POSTERS], idle_count = 0;
    for (uint32_t i = 0; i < connections; i++) {
        connect_poster(i);
        idle[idle_count++] = i;
    }
    uint64_t begun = 0, ok = 0, failed = 0;
    double cpu_before_s = cpu_s();
    uint64_t start_ns = now_ns(), end_ns = in_seconds(seconds);
    while (now_ns() < end_ns && failed < 100) {
        double due = per_s > 0 ? (double)(now_ns() - start_ns) * per_s / 1e9 : 1e18;
        for (; idle_count > 0 && (double)begun < due; begun++) post(&posters[idle[--idle_count]]);
        struct epoll_event events[MAX_POSTERS];
        int n = epoll_wait(poller, events, MAX_POSTERS, per_s > 0 ? 1 : 100);
        for (int i = 0; i < n; i++) {
            uint32_t index = events[i].data.u32;
            int status = read_answer(index);
            if (status == 0) continue;
            idle[idle_count++] = index;
            if (status == 200) ok++, histogram_add(now_ns() - posters[index].sent_ns);
            else failed++;
        }
    }
    printf("{\"connections\": %u, \"requests\": %lu, \"failed\": %lu, \"elapsed_s\": %.6f, ", connections, ok, failed,
           (double)(now_ns() - start_ns) / 1e9);
    print_latency();
    printf(", \"load_cpu_s\": %.4f}\n", cpu_s() - cpu_before_s);
}

/* ---- streams that return, and newcomers ---------------------------------------------------------------------- */

static void prepare_streams(const char *path, const char *last_event_id) {
    char position[200] = "";
    if (last_event_id != NULL) snprintf(position, sizeof position, "Last-Event-ID: %s\r\n", last_event_id);
    snprintf(request, sizeof request,
             "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\nCache-Control: no-cache\r\n%s\r\n",
             path, port, position);
    streams = calloc(stream_count, sizeof *streams);
    if (streams == NULL) die("out of memory");
}

static uint32_t open_again(void) {
    uint32_t again = 0;
    for (uint32_t i = 0; i < stream_count && dead_count > 0; i++) {
        if (streams[i].state != DEAD || now_ns() < streams[i].began_ns) continue;
        dead_count--;
        again++;
        open_stream(i);
    }
    return again;
}

static void mode_return(const char *path, const char *last_event_id, uint32_t messages) {
    prepare_streams(path, last_event_id);
    alarm(OPEN_LIMIT_S + STALL_LIMIT_S);
    goal = messages;
    uint64_t limit_ns = in_seconds(OPEN_LIMIT_S), look_ns = now_ns();
    uint32_t next = 0, again = 0;
    double cpu_before_s = cpu_s();
    return_ns = now_ns();
    while (reached_count < stream_count && now_ns() < limit_ns) {
        while (next < stream_count && next - head_count - dead_count < RETURN_WINDOW) open_stream(next++);
        turn(5);
        if (now_ns() < look_ns) continue;
        look_ns = now_ns() + PROBE_NS;
        again += open_again();
    }
    printf("{\"streams\": %u, \"back\": %u, \"back_s\": %.4f, \"again\": %u, \"uneven_streams\": %u, ", stream_count,
           reached_count, (double)(now_ns() - return_ns) / 1e9, again, uneven_streams(messages));
    print_latency();
    printf(", \"load_cpu_s\": %.4f}\n", cpu_s() - cpu_before_s);
}

static void mode_newcomers(const char *path, double per_s, double seconds) {
    stream_count = (uint32_t)(per_s * seconds);
    prepare_streams(path, NULL);
    alarm((unsigned)seconds + 2 * STALL_LIMIT_S);
    uint64_t start_ns = now_ns(), limit_ns = in_seconds(seconds + STALL_LIMIT_S);
    for (uint32_t next = 0; head_count + dead_count < stream_count && now_ns() < limit_ns; turn(1))
        if (next < stream_count && (double)(now_ns() - start_ns) * per_s / 1e9 >= (double)next) open_stream(next++);
    printf("{\"streams\": %u, \"opened\": %u, \"refused\": %u, ", stream_count, head_count, dead_count);
    print_latency();
    printf("}\n");
}

/* ---- main ---------------------------------------------------------------------------------------------------- */

static void mode_streams(const char *path, const char *publisher_spec) {
    prepare_streams(path, NULL);
    parse_publisher(publisher_spec);
    watch(EPOLL_CTL_ADD, publisher.fd, EPOLLIN, stream_count);
    alarm(OPEN_LIMIT_S + STALL_LIMIT_S);
    command_open();
    fflush(stdout);
    alarm(0);
    char line[200];
    while (fgets(line, sizeof line, stdin)) obey(line);
}

static bool mode_is(char **argv, int argc, const char *name, int count) {
    return argc == count && !strcmp(argv[1], name);
}

int main(int argc, char **argv) {
    poller = epoll_create1(0);
    setvbuf(stdin, NULL, _IONBF, 0); /* a pace looks at the descriptor for the next command */
    port = argc > 2 ? atoi(argv[2]) : 0;
    stream_count = argc > 4 ? (uint32_t)atoi(argv[4]) : 0;
    if (mode_is(argv, argc, "streams", 6)) mode_streams(argv[3], argv[5]);
    else if (mode_is(argv, argc, "return", 7)) mode_return(argv[3], argv[5], (uint32_t)atoi(argv[6]));
    else if (mode_is(argv, argc, "newcomers", 6)) mode_newcomers(argv[3], atof(argv[4]), atof(argv[5]));
    else if (mode_is(argv, argc, "post", 7)) mode_post(argv[3], (uint32_t)atoi(argv[4]), atof(argv[5]), atof(argv[6]));
    else die("usage: see the top of load.c");
    return 0;
}
