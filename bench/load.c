/* load.c: opens event streams, publishes numbered messages and measures how they arrive.
 *
 *   load streams PORT PATH COUNT PUBLISHER       opens COUNT streams of GET PATH, then obeys standard input:
 *       run OUTSTANDING BYTES SECONDS            publishes, with so many messages on their way at any time
 *       pace PER_S BYTES SECONDS                 publishes so many a second, until the next command at the latest
 *   load return PORT PATH COUNT ID MESSAGES      opens COUNT streams at once with this Last-Event-ID, as browsers do
 *                                                after a restart; each is back when it has the last missed message
 *   load floor PORT                              is a server: what the kernel alone costs, a bare loop of send()
 *
 * PUBLISHER is redis:PORT:CHANNEL (PUBLISH of a flask-sse message), nchan:PORT:PATH (an HTTP POST of the bare text)
 * or raw:PORT (a whole SSE frame, to the floor). Opening and every command answer with one line of JSON.
 *
 * Every message's text ends in a marker, '#' and the ten digits of its number, and nothing else in it has a '#'. The
 * streams are searched for markers only, so it does not matter how a server frames events or splits them over reads.
 * In a run, a message counts as delivered when all streams got it; only then is the next one published in its place.
 *
 * One thread, one epoll. What is measured at the same time runs in processes of their own, so that opening streams
 * delays no reading. A deliberate shortcut: writes to publishers block (they always read).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
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

enum { MARKER_DIGITS = 10, MAX_BYTES = 64 * 1024, READ_BYTES = 256 * 1024, MAX_EVENTS = 1024, MAX_SAMPLES = 1 << 26 };
enum { MAX_OUTSTANDING = 64, SLOTS = 1024 }; /* far more, in case messages overtake each other */
enum { OPEN_WINDOW = 256, RETURN_WINDOW = 800 }; /* streams that may wait for their head at once: the first is below
    usual listen backlogs; with more than the second, it is the kernel's retries that are measured */
enum { OPEN_LIMIT_S = 120, STALL_LIMIT_S = 10, MAX_FLOOR = 20000 };
static const uint64_t SECOND_NS = 1000000000, PROBE_NS = 50000000, QUIET_NS = 100000000;

static void die(const char *why, const char *what) {
    fprintf(stderr, "%s: %s\n", why, what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t in_seconds(double seconds) { return now_ns() + (uint64_t)(seconds * 1e9); }
static double seconds_since(uint64_t ns) { return (double)(now_ns() - ns) / 1e9; }

static double cpu_s(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static struct sockaddr_in address_of(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static void send_at_once(int fd) { setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int)); }

static int connect_to(int port, bool blocking) {
    struct sockaddr_in address = address_of(port);
    int fd = socket(AF_INET, SOCK_STREAM | (blocking ? 0 : SOCK_NONBLOCK), 0);
    if (fd < 0) die("socket", strerror(errno));
    send_at_once(fd);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        if (blocking) die("connect", strerror(errno));
        close(fd);
        return -1;
    }
    return fd;
}

static void send_all(int fd, const char *bytes, size_t length) {
    while (length > 0) {
        ssize_t n = send(fd, bytes, length, MSG_NOSIGNAL);
        if (n <= 0 && errno != EINTR) die("the publishing connection broke", strerror(errno));
        if (n > 0) bytes += n, length -= (size_t)n;
    }
}

static int poller, port;

static void watch(int operation, int fd, uint32_t events, uint32_t index) {
    struct epoll_event e = {.events = events, .data.u32 = index};
    if (epoll_ctl(poller, operation, fd, &e) < 0) die("epoll_ctl", strerror(errno));
}

static uint32_t samples[MAX_SAMPLES], sample_count; /* latencies, in tenths of a microsecond */

static void add_sample(uint64_t since_ns, uint64_t at_ns) {
    if (sample_count < MAX_SAMPLES) samples[sample_count++] = (uint32_t)((at_ns - since_ns) / 100);
}

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double percentile_ms(double share) {
    return sample_count ? samples[(uint32_t)(share * (double)(sample_count - 1))] / 1e4 : 0;
}

static struct message {
    uint32_t number, missing; /* the second: streams that have not got it yet */
    uint64_t sent_ns;
} slots[SLOTS];

static uint32_t next_number = 1, first_number = 1; /* of this run: lower ones are probes, or late from an earlier one */
static uint32_t goal;             /* of streams that return: the number of the last message that each has missed */
static uint64_t return_ns;        /* when they all began to */
static uint64_t overtaken; /* messages that were still on their way when their slot was needed: they count as missing */
static uint64_t published, completed, deliveries, last_marker_ns;

/* ---- publishing --------------------------------------------------------------------------------------------- */

static struct {
    enum { REDIS, NCHAN, RAW } kind;
    int port, fd;
    char name[200]; /* the channel, or the path */
    uint64_t errors;
} publisher;

static char publish_buffer[MAX_OUTSTANDING * (MAX_BYTES + 512)];

static size_t put_message(char *to, uint32_t number, int bytes) {
    static char text[MAX_BYTES + 1];
    int padding = bytes - MARKER_DIGITS - 1;
    memset(text, 'x', (size_t)padding);
    sprintf(text + padding, "#%010u", number);
    const char *command = "*3\r\n$7\r\nPUBLISH\r\n$%zu\r\n%s\r\n$%d\r\n{\"data\": \"%s\"}\r\n";
    const char *request = "POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%s";
    switch (publisher.kind) {
    case REDIS: return (size_t)sprintf(to, command, strlen(publisher.name), publisher.name, bytes + 12, text);
    case NCHAN: return (size_t)sprintf(to, request, publisher.name, bytes, text);
    default: return (size_t)sprintf(to, "data: %s\n\n", text);
    }
}

/* Publishes so many messages in one write; each is expected on `audience` streams. */
static void publish(uint64_t count, int bytes, uint32_t audience) {
    size_t length = 0;
    uint64_t sent_ns = now_ns();
    for (uint64_t i = 0; i < count; i++, published++) {
        struct message *m = &slots[next_number % SLOTS];
        if (m->missing > 0 && m->number >= first_number) overtaken++;
        *m = (struct message){.number = next_number, .missing = audience, .sent_ns = sent_ns};
        length += put_message(publish_buffer + length, next_number++, bytes);
    }
    send_all(publisher.fd, publish_buffer, length);
}

/* Replies are not waited for: they only tell errors. */
static void read_replies(void) {
    static char buffer[READ_BYTES + 1];
    ssize_t n = recv(publisher.fd, buffer, READ_BYTES, MSG_DONTWAIT);
    if (n == 0) die("publishing", "the connection was closed");
    if (n < 0) return;
    buffer[n] = 0;
    if (publisher.kind == REDIS && buffer[0] == '-') publisher.errors++;
    if (publisher.kind == NCHAN && (strstr(buffer, "HTTP/1.1 4") || strstr(buffer, "HTTP/1.1 5"))) publisher.errors++;
}

static void parse_publisher(const char *spec) {
    char kind[16];
    if (sscanf(spec, "%15[a-z]:%d:%199s", kind, &publisher.port, publisher.name) < 2) die("publisher?", spec);
    publisher.kind = !strcmp(kind, "redis") ? REDIS : !strcmp(kind, "nchan") ? NCHAN : RAW;
    publisher.fd = connect_to(publisher.port, true);
    if (publisher.kind == RAW) send_all(publisher.fd, "FEED\n", 5); /* the floor's sign for "not a stream" */
}

/* ---- streams ------------------------------------------------------------------------------------------------ */

static struct stream {
    int fd;
    enum { CONNECTING, WAITING, OPEN, DEAD } state;
    uint8_t head_matched; /* of "HTTP/1.? 200" */
    uint8_t digits_left;  /* of the marker that the last read ended in */
    bool reached;         /* got some message: the subscription really stands */
    uint32_t number;
    uint32_t arrived;  /* messages of this run */
    uint64_t began_ns; /* when it was opened, or is to be opened again */
} *streams;

static uint32_t stream_count, head_count, reached_count, dead_count;
static char request[512];

static void kill_stream(struct stream *s) {
    close(s->fd);
    if (s->state == OPEN) head_count--;
    if (s->reached) reached_count--;
    *s = (struct stream){.state = DEAD, .began_ns = now_ns() + SECOND_NS}; /* when it may come again */
    dead_count++;
}

static void open_stream(uint32_t index) {
    struct stream *s = &streams[index];
    *s = (struct stream){.fd = connect_to(port, false), .state = CONNECTING, .began_ns = now_ns()};
    if (s->fd >= 0) watch(EPOLL_CTL_ADD, s->fd, EPOLLOUT, index);
    else s->state = DEAD, dead_count++;
}

static void send_request(uint32_t index) {
    struct stream *s = &streams[index];
    ssize_t length = (ssize_t)strlen(request);
    s->state = WAITING;
    watch(EPOLL_CTL_MOD, s->fd, EPOLLIN | EPOLLRDHUP | EPOLLET, index);
    if (send(s->fd, request, (size_t)length, MSG_NOSIGNAL) != length) kill_stream(s);
}

static void on_marker(struct stream *s, uint32_t number, uint64_t at_ns) {
    last_marker_ns = at_ns;
    bool is_new = !s->reached && (goal == 0 || number == goal);
    if (is_new) s->reached = true, reached_count++;
    if (goal > 0) s->arrived++;
    if (goal > 0 && number == goal) add_sample(return_ns, at_ns);
    if (number < first_number || goal > 0) return;
    struct message *m = &slots[number % SLOTS];
    if (m->number != number || m->missing == 0) return;
    add_sample(m->sent_ns, at_ns);
    deliveries++;
    s->arrived++;
    if (--m->missing == 0) completed++;
}

static void scan(struct stream *s, const char *p, const char *end, uint64_t at_ns) {
    while (p < end) {
        if (s->digits_left == 0) {
            p = memchr(p, '#', (size_t)(end - p));
            if (p++ == NULL) return;
            s->digits_left = MARKER_DIGITS, s->number = 0;
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
    if (expected[s->head_matched]) return i;
    s->state = OPEN, head_count++;
    if (goal == 0) add_sample(s->began_ns, now_ns());
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
        if (n <= 0 || skip < 0) return (void)kill_stream(s);
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

static void prepare_streams(const char *path, const char *last_event_id) {
    char position[200] = "";
    if (last_event_id != NULL) snprintf(position, sizeof position, "Last-Event-ID: %s\r\n", last_event_id);
    const char *head = "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\n"
                       "Cache-Control: no-cache\r\n%s\r\n";
    snprintf(request, sizeof request, head, path, port, position);
    streams = calloc(stream_count, sizeof *streams);
    if (streams == NULL) die("streams", "out of memory");
}

static uint32_t uneven_streams(uint64_t messages) {
    uint32_t uneven = 0;
    for (uint32_t i = 0; i < stream_count; i++)
        if (streams[i].state == OPEN && streams[i].arrived != messages) uneven++;
    return uneven;
}

/* The line of JSON. */
static void answer(double elapsed_s, double cpu_before_s, uint32_t audience, uint64_t messages, uint32_t again) {
    qsort(samples, sample_count, sizeof *samples, by_size);
    printf("{\"streams\": %u, \"open\": %u, \"reached\": %u, \"closed\": %u, \"again\": %u, \"elapsed_s\": %.6f, ",
           stream_count, head_count, reached_count, dead_count, again, elapsed_s);
    printf("\"load_cpu_s\": %.6f, \"deliveries\": %lu, \"missing\": %lu, \"uneven\": %u, \"failed\": %lu, ",
           cpu_s() - cpu_before_s, deliveries, published * audience - deliveries, uneven_streams(messages),
           publisher.errors);
    printf("\"p50_ms\": %.4f, \"p99_ms\": %.4f, \"p999_ms\": %.4f, \"max_ms\": %.4f}\n", percentile_ms(0.5),
           percentile_ms(0.99), percentile_ms(0.999), percentile_ms(1));
    fflush(stdout);
}

/* Opens all streams as fast as the server takes them, then sends probes until every stream has seen one. Some servers
 * send no head before the first event: when none at all comes for a second, heads are no longer waited for. Probes are
 * work for the server, so while heads still come there are none, and the waits between them grow. */
static void open_all(void) {
    uint64_t start_ns = now_ns(), limit_ns = in_seconds(OPEN_LIMIT_S), progress_ns = start_ns, probe_ns = PROBE_NS;
    uint32_t next = 0, before = 0;
    bool headless = false, all_heads = false, probed = false;
    double cpu_before_s = cpu_s();
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
        if (head_count + dead_count == stream_count) all_heads = true;
        if (head_count == 0 && now - start_ns > SECOND_NS) headless = true;
        uint64_t quiet_ns = now - (last_marker_ns > progress_ns ? last_marker_ns : progress_ns);
        uint64_t patience_ns = all_heads ? probe_ns : headless ? 4 * probe_ns : SECOND_NS;
        if (next == stream_count && ((all_heads && !probed) || quiet_ns > patience_ns)) {
            publish(1, 64, stream_count);
            probed = true;
            progress_ns = now_ns();
            if (probe_ns < 10 * PROBE_NS) probe_ns += probe_ns / 2;
        }
    }
    answer(seconds_since(start_ns), cpu_before_s, 0, 0, 0);
}

/* Late probes would be work that nobody counts: begin when nothing has come for a while. */
static void begin_publishing(int bytes) {
    if (bytes < MARKER_DIGITS + 1 || bytes > MAX_BYTES) die("bytes", "out of range");
    uint64_t start_ns = now_ns(), limit_ns = in_seconds(STALL_LIMIT_S);
    for (last_marker_ns = start_ns; now_ns() < limit_ns && now_ns() - last_marker_ns <= QUIET_NS;) turn(20);
    first_number = next_number;
    sample_count = 0;
    published = completed = overtaken = deliveries = 0;
    for (uint32_t i = 0; i < stream_count; i++) streams[i].arrived = 0;
    if (reached_count == 0) die("streams", "none is open");
}

static void command_run(int outstanding, int bytes, double seconds) {
    if (outstanding < 1 || outstanding > MAX_OUTSTANDING) die("outstanding", "out of range");
    begin_publishing(bytes);
    uint32_t audience = reached_count;
    double cpu_before_s = cpu_s();
    uint64_t start_ns = now_ns(), end_ns = in_seconds(seconds), stall_ns = STALL_LIMIT_S * SECOND_NS;
    last_marker_ns = start_ns;
    while (now_ns() - last_marker_ns <= stall_ns) {
        if (now_ns() < end_ns) publish(completed + (uint64_t)outstanding - published, bytes, audience);
        else if (completed == published) break;
        uint64_t done = completed;
        while (completed == done && now_ns() - last_marker_ns <= stall_ns) turn(50);
    }
    answer((double)(last_marker_ns - start_ns) / 1e9, cpu_before_s, audience, published, 0);
}

/* The next command's first byte ends it; what is on its way then still counts. */
static void command_pace(double per_s, int bytes, double seconds) {
    if (per_s <= 0 || per_s > 10000) die("pace", "out of range");
    begin_publishing(bytes);
    uint32_t audience = reached_count;
    double cpu_before_s = cpu_s();
    uint64_t start_ns = now_ns(), end_ns = in_seconds(seconds);
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    while (now_ns() < end_ns && poll(&input, 1, 0) == 0) {
        if (seconds_since(start_ns) * per_s >= (double)published) publish(1, bytes, audience);
        turn(1);
    }
    uint64_t limit_ns = in_seconds(STALL_LIMIT_S);
    double elapsed_s = seconds_since(start_ns);
    while (completed + overtaken < published && now_ns() < limit_ns) turn(20);
    answer(elapsed_s, cpu_before_s, audience, published, 0);
}

static void obey(const char *line) {
    int outstanding, bytes;
    double per_s, seconds;
    alarm(6 * STALL_LIMIT_S + OPEN_LIMIT_S + 60);
    if (sscanf(line, "run %d %d %lf", &outstanding, &bytes, &seconds) == 3) command_run(outstanding, bytes, seconds);
    else if (sscanf(line, "pace %lf %d %lf", &per_s, &bytes, &seconds) == 3) command_pace(per_s, bytes, seconds);
    else if (strcmp(line, "stop\n") != 0) die("command?", line); /* "stop" has ended a pace, and says nothing more */
    alarm(0);
}

static void mode_streams(const char *path, const char *publisher_spec) {
    prepare_streams(path, NULL);
    parse_publisher(publisher_spec);
    watch(EPOLL_CTL_ADD, publisher.fd, EPOLLIN, stream_count);
    alarm(OPEN_LIMIT_S + STALL_LIMIT_S);
    open_all();
    alarm(0);
    char line[200];
    while (fgets(line, sizeof line, stdin)) obey(line);
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
        for (uint32_t i = 0; i < next && dead_count > 0; i++) {
            if (streams[i].state != DEAD || now_ns() < streams[i].began_ns) continue;
            dead_count--, again++;
            open_stream(i);
        }
    }
    answer(seconds_since(return_ns), cpu_before_s, 0, messages, again);
}

/* A connection whose first bytes are "FEED\n" publishes: whatever is read from it goes to all streams as it is, in one
 * send() each. Every other connection is a stream. Nothing is parsed, queued or checked, so no server can do less. */
static void mode_floor(void) {
    static const char head[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
    static int all[MAX_FLOOR], count, feed = -1;
    static char bytes[READ_BYTES];
    struct sockaddr_in address = address_of(port);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0) die("port", strerror(errno));
    listen(listener, 4096);
    for (watch(EPOLL_CTL_ADD, listener, EPOLLIN, (uint32_t)listener);;) {
        struct epoll_event events[MAX_EVENTS];
        int n = epoll_wait(poller, events, MAX_EVENTS, -1);
        for (int i = 0; i < n; i++) {
            int fd = (int)events[i].data.u32;
            if (fd == listener) {
                if ((fd = accept(listener, NULL, NULL)) < 0) continue;
                send_at_once(fd);
                watch(EPOLL_CTL_ADD, fd, EPOLLIN, (uint32_t)fd);
                continue;
            }
            ssize_t length = read(fd, bytes, sizeof bytes);
            if (fd == feed && length <= 0) return;
            if (length >= 5 && !memcmp(bytes, "FEED\n", 5)) {
                feed = fd;
            } else if (fd != feed) {
                epoll_ctl(poller, EPOLL_CTL_DEL, fd, NULL);
                if (length <= 0 || count == MAX_FLOOR || send(fd, head, sizeof head - 1, MSG_NOSIGNAL) < 0) close(fd);
                else all[count++] = fd;
            } else {
                for (int j = 0; j < count; j++) {
                    if (send(all[j], bytes, (size_t)length, MSG_NOSIGNAL | MSG_DONTWAIT) == length) continue;
                    close(all[j]); /* gone, or not reading: the last stream takes its place */
                    all[j--] = all[--count];
                }
            }
        }
    }
}

int main(int argc, char **argv) {
    poller = epoll_create1(0);
    setvbuf(stdin, NULL, _IONBF, 0); /* a pace looks at the descriptor for the next command */
    port = argc > 2 ? atoi(argv[2]) : 0;
    stream_count = argc > 4 ? (uint32_t)atoi(argv[4]) : 0;
    const char *mode = argc > 2 ? argv[1] : "";
    if (argc == 6 && !strcmp(mode, "streams")) mode_streams(argv[3], argv[5]);
    else if (argc == 7 && !strcmp(mode, "return")) mode_return(argv[3], argv[5], (uint32_t)atoi(argv[6]));
    else if (argc == 3 && !strcmp(mode, "floor")) mode_floor();
    else die("usage", "see the top of load.c");
    return 0;
}
